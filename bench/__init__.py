"""Measurements: benchmarks for pytest, records of what they measured, and tables made from the records alone."""
