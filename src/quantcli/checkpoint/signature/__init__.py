"""Signatures over all files of a checkpoint, in the format of OpenSSF Model Signing.

cryptography is imported when it is needed."""
