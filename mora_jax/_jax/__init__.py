"""What JAX lacks: linear maps with a transpose of their own, and ways around qwix."""
