"""Measures what a run costs: speed and memory."""
