"""Slow, plain NumPy float64 oracles, written from the papers and never from this project's code.

Each file states one published algorithm with loops over rows, heads and tokens, so that a reader can check
it against the paper line by line. The tests compare the project with these; when the two disagree, the paper
decides, and the oracle is not bent to the code.

Nothing here imports jax or k2jax.
"""
