"""Where a rotation can be: the places of a model's residual stream and of its heads, from data flow.

Random weights stand for the model's; no byte of them is read."""
