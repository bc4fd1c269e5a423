"""The five commands as Python functions: options in, data out.

They print nothing. The command line is in `cli`."""
