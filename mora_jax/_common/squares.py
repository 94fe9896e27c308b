"""The name and the version of the files that a server reads squares from."""

KEY, VERSION = "mora_jax", 1
"""The entry of `adapter_config.json` that says how, and its version."""
