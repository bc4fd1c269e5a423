"""Proves that a checkpoint is whole, loadable and faithful: structure, bytes, numbers, text.

Each check knows formats only through their target."""
