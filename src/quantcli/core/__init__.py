"""What every other package may use: errors, findings, numerics, threads, files on disk.

Nothing here knows a checkpoint, a recipe, a scheme or a target."""
