"""Training of the weights that survive, towards what the dense model computes."""
