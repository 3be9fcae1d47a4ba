"""The 2012 AlexNet: network, training recipe, data, evaluation. Each command is ``python -m net.NAME``."""
