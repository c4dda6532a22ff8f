"""What a machine is and whether it computes rightly: ops against references, rates, twenty steps, what is slow."""
