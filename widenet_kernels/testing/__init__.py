"""What tests and benchmarks share: the shapes worth trying, inputs made from a seed, the tolerance policy."""
