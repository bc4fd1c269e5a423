"""config.json and quantization configs, untrusted, read by type. Imports no torch."""
