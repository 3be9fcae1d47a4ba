"""The network: its architecture, its forms, and its weights as others keep them."""
