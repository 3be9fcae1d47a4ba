"""The Triton kernels: the chain forward and backward, bias and ReLU, the training input and the optimizer's update."""
