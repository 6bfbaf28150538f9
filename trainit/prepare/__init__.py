"""Text to token ids on disk."""
