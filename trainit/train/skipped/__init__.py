"""Steps and data that a run leaves out, why, and the lines about them."""
