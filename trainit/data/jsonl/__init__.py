"""Training straight from JSON lines."""
