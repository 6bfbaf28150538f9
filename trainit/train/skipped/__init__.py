"""Steps and data that a run leaves out, and what is said about them."""
