"""Formats that serving engines load: one folder for each, found by scanning this folder.

A target stores the codes and scales of any scheme, and knows the rules of its engine."""
