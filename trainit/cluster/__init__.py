"""The job's processes: where each is, how they meet, watch each other and stop."""
