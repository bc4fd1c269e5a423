"""A scheme and a target that quantcli finds by their entry points."""
