"""How an adapted layer is computed: the equation, and the ways to compute it."""
