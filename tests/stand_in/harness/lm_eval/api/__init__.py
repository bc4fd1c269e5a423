"""The API of the stand-in."""
