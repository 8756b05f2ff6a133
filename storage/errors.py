"""The errors that users see: one sentence each, naming what is wrong and what to do next."""

__all__ = [
    "ActlakeError",
    "DamagedFileError",
    "QueryError",
    "QueryInterruptedError",
    "QueryMemoryError",
    "QueryReadError",
    "StoreError",
]


class ActlakeError(Exception):
    """Base of every error whose message is written for the user.

    The command line prints the message alone and exits with status 2. Anything that is not an
    `ActlakeError` is a bug and keeps its traceback.
    """


class StoreError(ActlakeError):
    """A store cannot be opened, read or written as asked."""


class DamagedFileError(StoreError):
    """A file of the store is missing, truncated or altered."""


class QueryError(ActlakeError):
    """DuckDB refused a query; the message is DuckDB's own."""


class QueryInterruptedError(QueryError):
    """A query was stopped before its end."""


class QueryMemoryError(QueryError):
    """A query needs more memory than it may take."""


class QueryReadError(QueryError):
    """A query met a file of the store that cannot be read."""
