"""Proves that a checkpoint is whole, loads and is faithful: structure, bytes, numbers, text.

Each check knows formats only through their target."""
