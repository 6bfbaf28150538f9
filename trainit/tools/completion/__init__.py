"""Completes commands, flags, files and fields in a shell."""
