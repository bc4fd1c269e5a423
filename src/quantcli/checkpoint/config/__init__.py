"""config.json and quantization configs of strangers, read by type. Imports no torch."""
