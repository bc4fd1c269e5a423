"""Models on the Hugging Face Hub: by name to a folder, with their weights or with headers alone."""

from quantcli.checkpoint.hub.find import HUB_ID, display_name, find_headers, find_model

__all__ = ["HUB_ID", "display_name", "find_headers", "find_model"]
