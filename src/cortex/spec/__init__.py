"""What users write and what travels: pure data, no I/O."""
