"""Reads, bounds and shows untrusted input: names, JSON, YAML, expressions.

A fault of it is an InputError that names its place, never another exception."""
