"""The cost of a layer, also with many adapters, and its growth with a model's sizes."""
