"""The recipe: a YAML file, read strictly and checked against its schema.

Names of schemes and targets are resolved here; checkpoints are not read."""
