"""Bytes spent where they matter: units that take one scheme, what each costs, the choice, its rules."""
