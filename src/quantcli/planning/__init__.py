"""The plan, a pure value: each tensor with its rule, each output shard with its tensors.

Planning quantizes a block of no rows to learn what comes out. `block` computes the rows of a plan's
items, for whoever writes them or compares with them; nothing is written here."""
