"""An adapted layer: the equation, and the ways to compute it."""
