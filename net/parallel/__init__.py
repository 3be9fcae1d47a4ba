"""The network on several devices: ``--parallel data``, ``tower`` and ``hybrid``.

A strategy is a function from the plain network to this rank's part of it, a file each; :mod:`net.parallel.strategies`
chooses. It replaces the exchange and the weights that belong to other ranks; ``net/model/alexnet.py`` knows
nothing of it. Messages are PyTorch's: DistributedDataParallel, and functional collectives with their gradients.
Checkpoints are in the one-device layout whatever ran.
"""
