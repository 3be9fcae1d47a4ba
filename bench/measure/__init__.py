"""How it is measured: timing, memory, the machine's ceilings, and records."""
