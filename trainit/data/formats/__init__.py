"""Other programs' token files."""
