"""Where files that users give are opened: a module for each format, and nothing else in :mod:`net` opens them.

Each compares sizes before it takes memory, checks that the content is what the format allows, and refuses the rest with
a :class:`~net.common.errors.DataError` that names the file. A MemoryError passes: it is no fault of the file, and
nothing may go on without it.
"""
