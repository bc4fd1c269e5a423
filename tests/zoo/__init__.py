"""The zoo: tiny random checkpoints of every family, and what each recipe makes of them.

What transformers writes is an entry in `dense`, `mixtures`, `multimodal` or `encoders`: a config class
and what it is given. What is published in another layout is a function in `published`. `run` converts
all of them with all recipes and compares the outcomes with expected.txt; `make zoo` does so. `judge`
says what a tensor is without asking quantcli; `logits` has transformers compute with conversions.
"""
