"""Who signed a checkpoint, and whether its files are still those that were signed."""
