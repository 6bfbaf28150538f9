"""What a run costs: speed and memory, measured."""
