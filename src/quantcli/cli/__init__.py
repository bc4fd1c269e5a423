"""What the user types and sees: options, commands, tables, progress.

Nothing is computed here.
"""
