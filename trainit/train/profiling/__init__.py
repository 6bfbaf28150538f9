"""What a run's devices do, and what fills their memory."""
