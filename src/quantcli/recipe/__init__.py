"""The recipe: a YAML file, read strictly and checked against its schema; shipped recipes by name.

Names of schemes and targets are resolved here; checkpoints are not read."""
