"""Data files to token rows: read, recognize the format, split, tokenize."""
