"""Rooflines of programs that are compiled for chips."""
