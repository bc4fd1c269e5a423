"""What will happen, as a pure value: each tensor to its rule, each output shard with its tensors.

Nothing is converted here. Planning quantizes a block of no rows to learn what comes out."""
