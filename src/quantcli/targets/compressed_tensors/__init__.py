"""The compressed-tensors format, which vLLM, SGLang and transformers load."""
