"""The calibrations in one folder: what each depends on, where it is, and several made together."""
