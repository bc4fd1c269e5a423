"""How much the model loses if some of its modules are quantized: measured on text, or without it."""
