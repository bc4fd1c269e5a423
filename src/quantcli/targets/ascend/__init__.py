"""The format of vLLM-Ascend: quant_model_description.json next to safetensors."""
