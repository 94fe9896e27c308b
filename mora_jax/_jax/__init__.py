"""Additions to JAX: linear maps with transposes of their own, tiles, constants."""
