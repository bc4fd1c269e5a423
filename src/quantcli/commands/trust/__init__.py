"""Commands by which others can trust a checkpoint: `reproduce` makes it again and compares."""
