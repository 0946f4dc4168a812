"""Answers that need more than the request's transaction: work that comes when it has committed.

Waiting for Temporal must not hold a database connection: a handful of slow calls would stop the whole API. So an
endpoint that has to wait reads what it needs and returns `Afterwards`; its work runs when the transaction has ended
and its connection is back in the pool, and the answer is the work's.
"""

from collections.abc import Awaitable, Callable

from starlette.responses import Response


class Afterwards(Response):
    """In place of an answer: `work` makes the answer, after the commit. What it raises becomes an error as usual."""

    def __init__(self, work: Callable[[], Awaitable[Response]]) -> None:
        super().__init__()
        self.work = work
