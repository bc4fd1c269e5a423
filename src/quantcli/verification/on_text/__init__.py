"""The depth `run`: both models on text, side by side, and how their outputs differ."""
