"""The two ways a command refuses its input. Their text is one line that names the flag or file and what is allowed."""


class UsageError(ValueError):
    """A flag or a configuration value that is not allowed; a command exits with 2."""


class DataError(ValueError):
    """A file or folder that cannot be used as it is; a command exits with 1."""
