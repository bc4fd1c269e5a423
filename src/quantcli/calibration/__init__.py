"""Runs samples through the float model, one layer at a time, and keeps what schemes need of it.

It writes a folder of statistics; converting is elsewhere."""
