"""Steps of a run, done again and compared with its log."""
