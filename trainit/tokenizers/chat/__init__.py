"""Conversations as text and as token ids, by the chat template of a tokenizer."""
