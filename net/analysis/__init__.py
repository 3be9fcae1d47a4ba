"""Analysis of trained networks: features, retrieval, ablations, the paper's figures."""
