"""The one exception of the data package: something is wrong with the user's files."""


class DataError(ValueError):
    """Input that cannot be used. The message says what came, where, and what to do about it."""
