"""Commands by which others can trust a checkpoint, as functions."""
