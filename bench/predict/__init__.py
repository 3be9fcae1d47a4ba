"""Computed, not measured: the work of each layer, messages between ranks, a cost model of strategies."""
