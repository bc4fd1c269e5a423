"""Decisions from a layer and its inputs: smoothing, learning, ranges, rounding."""
