"""Text to token ids on disk, and from there to global batches on the devices."""
