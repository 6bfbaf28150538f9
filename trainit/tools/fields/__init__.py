"""Lists the fields of configs."""
