"""What a run keeps: saving, digests, restoring, and reading finished runs."""
