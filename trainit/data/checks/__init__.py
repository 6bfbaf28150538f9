"""Whether prepared data on the disk are as they were written."""
