"""The format of vLLM-Ascend: quant_model_description.json beside safetensors."""
