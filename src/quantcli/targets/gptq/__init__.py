"""The format of AutoGPTQ and its successor gptqmodel, which vLLM, SGLang, TGI and ExLlama load."""
