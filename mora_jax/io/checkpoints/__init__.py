"""Whole models in safetensors: read into params, and merged with adapters."""
