"""The model card of an output: README.md, as a part of the plan, from which all of it follows."""
