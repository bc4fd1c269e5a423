"""A checkpoint in another basis: orthogonal matrices on the residual stream and on the values of heads.

`places` says which stored tensors they concern; it holds names and sizes, and no torch."""
