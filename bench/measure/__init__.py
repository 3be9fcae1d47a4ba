"""Measuring: timing, memory, the machine's ceilings, and records."""
