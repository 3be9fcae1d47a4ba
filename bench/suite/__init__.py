"""The parts of ``python -m bench.device_suite``, one module each, and shared code.

A part is a module with ``rows(run)``, which yields the rows of the record as they are measured. Optionally,
``ahead(run)`` yields named jobs that compile or write something before anything is timed.
"""
