"""Measurements, each with its claim: costs of MoRA, and what it learns."""
