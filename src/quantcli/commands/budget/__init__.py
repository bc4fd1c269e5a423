"""Schemes chosen within a budget: what modules may take, what that costs, the choice, its recipe."""
