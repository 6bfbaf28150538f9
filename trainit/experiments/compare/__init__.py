"""Compares runs: reads their folders, computes what they reached and how fast, draws it."""
