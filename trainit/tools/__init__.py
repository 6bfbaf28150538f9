"""Commands about one run, its machine or the command line."""
