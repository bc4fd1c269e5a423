"""A checkpoint whose source was rotated: the matrices are found in the weights, and all must fit.

Nothing that the checkpoint says of its rotation is believed."""
