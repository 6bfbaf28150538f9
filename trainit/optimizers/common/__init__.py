"""Finds optimizers by name, joins them for groups of parameters, and keeps their state in few bits."""
