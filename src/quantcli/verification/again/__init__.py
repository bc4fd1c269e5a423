"""A conversion made again from its source and compared: from the manifest to a plan, then row by row."""
