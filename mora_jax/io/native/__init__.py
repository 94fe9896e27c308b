"""This library's own files: adapters with their plan, and plans as text."""
