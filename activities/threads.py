"""Databases for activities that run in threads: each thread has one of its own, with an event loop of its own.

It is kept from one activity to the next, because a fresh connection costs more than a batch of events: logging in, and
then planning every statement anew.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import TypeVar

from db.session import Database
from domain.clock import Clock

T = TypeVar("T")


class ThreadDatabases:
    """Runs coroutines of activities in the calling thread. `close` it when no thread runs one any more."""

    def __init__(self, url: str, clock: Clock) -> None:
        self._url = url
        self._clock = clock
        self._of_thread = threading.local()
        self._opened: list[tuple[asyncio.AbstractEventLoop, Database]] = []

    def run(self, work: Callable[[Database], Awaitable[T]]) -> T:
        """Run `work` with this thread's database to its end; its result."""
        loop, database = self._own()

        async def finished() -> T:
            return await work(database)

        return loop.run_until_complete(finished())

    def close(self) -> None:
        """Close every connection. Blocks for a moment."""
        while self._opened:
            loop, database = self._opened.pop()
            loop.run_until_complete(database.close())
            loop.close()

    def _own(self) -> tuple[asyncio.AbstractEventLoop, Database]:
        own: tuple[asyncio.AbstractEventLoop, Database] | None = getattr(self._of_thread, "own", None)
        if own is None:
            loop = asyncio.new_event_loop()
            database = Database(self._url, size=1, timeout_s=10, clock=self._clock)
            loop.run_until_complete(database.open())
            own = self._of_thread.own = (loop, database)
            self._opened.append(own)
        return own
