"""The cost of a layer, and its growth with the sizes of a model."""
