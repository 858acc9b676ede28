"""How matrices are stored: the checkpoint's tensors of each, and the product that they become."""
