"""Services and layers with many adapters at once."""
