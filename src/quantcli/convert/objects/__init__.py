"""Checkpoints that are written to object storage: uploads, a journal among the objects.

Nothing of a shard touches a disk of this machine."""
