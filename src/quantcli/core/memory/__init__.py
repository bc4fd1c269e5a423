"""Memory: what this process may take, and errors for want of it. Imports nothing heavy."""
