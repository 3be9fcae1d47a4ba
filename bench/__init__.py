"""Measurements: pytest benchmarks, the records of their results, and tables generated only from the records."""
