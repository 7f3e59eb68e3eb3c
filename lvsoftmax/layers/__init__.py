"""One final output layer per file; the file, its yaml in ``configs/output`` and its class share a name."""
