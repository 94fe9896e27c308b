"""Tools that JAX lacks, such as linear maps with a transpose of their own."""
