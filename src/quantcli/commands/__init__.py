"""The five commands as Python functions: options in, data out.

They print nothing. What the user types and sees is in `cli`."""
