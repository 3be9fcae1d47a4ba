"""The network: architecture, forms, and weights in this and other projects' formats."""
