"""How it is measured: timing, memory, the machine's ceilings, and the records that hold what came out."""
