"""The time of a training step beside other methods."""
