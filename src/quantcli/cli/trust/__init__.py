"""Commands by which others can trust a checkpoint: their options and their output."""
