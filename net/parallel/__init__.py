"""The network on several devices: ``--parallel data``, ``tower`` and ``hybrid``.

A strategy is a function, in a file of its own, from the plain network to this rank's part of it;
:mod:`net.parallel.strategies` lists them. It replaces the exchange between towers and drops the weights of other ranks;
``net/model/alexnet.py`` is unaware of it. Communication is PyTorch's: DistributedDataParallel, and functional
collectives with autograd. Checkpoints are always in the one-device layout.
"""
