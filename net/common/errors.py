"""Exceptions that end a command. The message is one line naming the flag, file or rank and what is allowed."""


class UsageError(ValueError):
    """An invalid flag or configuration value; the command exits with status 2."""


class DataError(ValueError):
    """An unusable file or folder; the command exits with status 1."""


class MissingError(DataError):
    """A file that does not exist, or was deleted meanwhile."""


class RankError(Exception):
    """A failure of one of the run's processes, which the message names; the command exits with status 1."""
