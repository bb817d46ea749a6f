"""The data that users write and that programs exchange: pure data, no I/O."""
