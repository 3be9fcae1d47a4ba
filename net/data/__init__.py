"""Images: the packed store and how it is made, the embedded digits, CIFAR-10, random images, and the loader."""
