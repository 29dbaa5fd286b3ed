"""Training of the surviving weights, towards the dense model's outputs."""
