"""The one exception of the data package, raised for faults in the user's files."""


class DataError(ValueError):
    """Input that cannot be used. The message states what was found, where, and what to do about it."""
