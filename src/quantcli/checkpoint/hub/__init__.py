"""Models by name: repositories of the Hugging Face Hub, and addresses of other places, as folders."""

from quantcli.checkpoint.hub.find import (
    HUB_ID,
    Pending,
    display_name,
    find_headers,
    find_model,
    locate,
    mount,
)

__all__ = [
    "HUB_ID",
    "Pending",
    "display_name",
    "find_headers",
    "find_model",
    "locate",
    "mount",
]
