"""Readers of untrusted input files, a module for each format. Nothing else in :mod:`net` opens files given by users.

Each reader checks sizes before it allocates memory, validates the content, and rejects anything else with a
:class:`~net.common.errors.DataError` that names the file. A MemoryError is passed on: the file is not at fault.
"""
