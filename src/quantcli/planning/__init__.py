"""The plan, a pure value: each tensor with its rule, each output shard with its tensors.

Nothing is converted here. Planning quantizes a block of no rows to learn what comes out."""
