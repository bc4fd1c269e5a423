"""Shared by all packages: errors, findings, numerics, threads, files on disk.

Nothing here knows checkpoints, recipes, schemes or targets."""
