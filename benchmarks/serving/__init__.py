"""Adapters in vLLM."""
