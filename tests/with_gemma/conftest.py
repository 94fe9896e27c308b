"""Keras chooses its backend when it is imported, which gemma may do by TensorFlow."""

import os

os.environ["KERAS_BACKEND"] = "jax"
