"""Trainit pre-trains GPT models with JAX on many hosts."""

__version__ = "0.1.0"
