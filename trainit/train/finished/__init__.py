"""Runs that something is made of: exports, texts."""
