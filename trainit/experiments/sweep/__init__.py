"""Starts many runs from one file: a grid or a random search over fields and seeds, or a schedule search."""
