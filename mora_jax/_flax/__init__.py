"""What Linen and NNX share: what is known of layers, and how a call is adapted."""
