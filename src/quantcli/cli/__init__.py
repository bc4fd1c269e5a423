"""The command line: options, commands, tables, progress.

Nothing is computed here."""
