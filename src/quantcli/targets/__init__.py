"""How the result is stored: one file, one format."""
