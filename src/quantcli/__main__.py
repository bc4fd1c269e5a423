"""python -m quantcli."""

from quantcli.cli import entry

entry()
