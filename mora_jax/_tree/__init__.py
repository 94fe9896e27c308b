"""Trees of adapters: made, found, merged, optimized."""
