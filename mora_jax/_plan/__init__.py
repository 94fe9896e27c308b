"""Settings, and the plan made of them."""
