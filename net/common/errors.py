"""The ways a command ends early. Their text is one line that names the flag, file or rank and what is allowed."""


class UsageError(ValueError):
    """A flag or a configuration value that is not allowed; a command exits with 2."""


class DataError(ValueError):
    """A file or folder that cannot be used as it is; a command exits with 1."""


class MissingError(DataError):
    """A file that does not exist, or no longer does."""


class RankError(Exception):
    """Something is wrong with one of a run's processes, which the message names; a command exits with 1."""
