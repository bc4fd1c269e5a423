"""A conversion made again from its source and compared: the plan from the manifest, then the rows."""
