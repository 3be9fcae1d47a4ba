"""The parts of ``python -m bench.device_suite``, a module each, and what they share.

A part is a module with ``rows(run)``, which yields the rows of the record as they are measured; ``ahead(run)``, where
it has one, yields what is to be compiled or written before anything is timed, each under a name of its own.
"""
