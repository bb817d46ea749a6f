"""Where workers run: one folder per engine, all behind the protocol of `engines.base`."""
