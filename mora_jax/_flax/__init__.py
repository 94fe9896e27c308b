"""Shared by Linen and NNX: the rules of layer classes, and a call with an adapter."""
