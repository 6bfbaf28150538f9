"""What a checkpoint has in addition to its arrays: digests of its files, and early news of failed writes."""
