"""What is measured: operators, layers, whole networks, other libraries, and one rank of a parallel strategy."""
