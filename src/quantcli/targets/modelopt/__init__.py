"""The format of NVIDIA's Model-Optimizer, which TensorRT-LLM, vLLM and SGLang load."""
