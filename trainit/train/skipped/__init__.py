"""Steps and data that a run leaves out, and the lines about them."""
