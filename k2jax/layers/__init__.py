"""Layers: an nnx.Module defines and initialises each one's parameters, a plain function beside it uses them."""
