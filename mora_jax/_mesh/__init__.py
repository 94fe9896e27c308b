"""Meshes of devices that share the features of layers."""
