"""What the user asks for: the YAML recipe, read strictly and checked against its schema.

It resolves names of schemes and targets; it looks at no checkpoint."""
