"""Triton kernels that are no operators: the training input and the optimizer's update, each in one pass over memory."""
