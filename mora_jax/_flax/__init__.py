"""What Linen and NNX share: the rules of layer classes, and a call with an adapter."""
