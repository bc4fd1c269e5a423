"""Text for calibration: documents, windows of tokens, batches."""
