"""Experiments on what is learned, where the other benchmarks are about time."""
