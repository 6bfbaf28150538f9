"""Checks of a machine and a config."""
