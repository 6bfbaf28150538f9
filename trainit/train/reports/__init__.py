"""What a run says of itself: at its start, in a tracker, and how long its start took."""
