"""The loss of a trained model, on any data that the trainer reads."""
