"""What is done with trained networks: features, retrieval, ablations, the paper's figures."""
