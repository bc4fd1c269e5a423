"""Formats that serving engines load: one folder for each, found by scanning this folder.

A target stores what a scheme makes and knows what its engine accepts. It knows no scheme."""
