"""Models on the Hugging Face Hub: by name to a folder, with their weights or with headers alone."""

from quantcli.checkpoint.hub.find import HUB_ID, find_headers, find_model, shown

__all__ = ["HUB_ID", "find_headers", "find_model", "shown"]
