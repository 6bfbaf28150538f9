"""The GPT: layers, attention, cross-entropy."""
