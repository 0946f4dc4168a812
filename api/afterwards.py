"""Answers that need more than the request's transaction: work that comes when it has committed.

Waiting for Temporal must not hold a database connection: a handful of slow calls would stop the whole API. So an
endpoint that has to wait reads what it needs and returns `Afterwards`; its work runs when the transaction has ended
and its connection is back in the pool, and the answer is the work's.

What is ordered from a workflow is done in time or never (docs/decisions/0007-answered-or-never.md): `in_time` waits for
its answer, and asks the database where there was none.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar
from uuid import UUID

import structlog
from starlette.responses import Response

from db.session import Database, DatabaseUnavailable, OutcomeUnknown, Transaction
from domain.in_time import wait_at_most
from settings import Settings
from workflows.gateway import TemporalUnavailable

logger = structlog.get_logger("scrip.api")

T = TypeVar("T")

# The rest of the wait is for asking the database what has become of the order.
_SHARE_OF_WAIT = 0.8
_GRACE_S = 0.5


class Afterwards(Response):
    """In place of an answer: `work` makes the answer, after the commit. What it raises becomes an error as usual."""

    def __init__(self, work: Callable[[], Awaitable[Response]]) -> None:
        super().__init__()
        self.work = work


def wait_of(settings: Settings) -> float:
    """How many seconds an order may take that a workflow carries out; it says so itself, as `not_after`."""
    return settings.temporal_timeout_s * _SHARE_OF_WAIT


def patience_of(settings: Settings) -> float:
    """How many seconds a lock is waited for to see what has become of an order: the rest of the wait, and grace."""
    return settings.temporal_timeout_s * (1 - _SHARE_OF_WAIT) + _GRACE_S


async def look(
    database: Database,
    organization_id: UUID,
    work: Callable[[Transaction], Awaitable[T]],
    patience_s: float | None = None,
) -> T:
    """Run `work` in a transaction after an order, waiting for a lock no longer than `patience_s` (None: as usual).

    Raises OutcomeUnknown where the database doesn't answer: without it nobody knows what was done.
    """

    async def patiently(tx: Transaction) -> T:
        if patience_s is not None:
            await wait_at_most(tx, patience_s)
        return await work(tx)

    try:
        return await database.repeat(organization_id, patiently)
    except DatabaseUnavailable as error:
        raise OutcomeUnknown(f"what was done could not be read: {error}") from error


async def in_time(ask: Callable[[], Awaitable[T]], outcome: Callable[[], Awaitable[T]], wait_s: float) -> T:
    """What a workflow answered, or else what the database says has become of the order once its time is over.

    `ask` raises TemporalUnavailable where no answer comes within `wait_s` seconds. The order's `not_after` is no later
    than so many seconds after this is called.
    """
    asked_at = time.monotonic()
    try:
        return await ask()
    except TemporalUnavailable as error:
        logger.warning("a workflow did not answer in time", reason=str(error))
        # Until its time is over the order may still be carried out; after that the database knows.
        await asyncio.sleep(asked_at + wait_s - time.monotonic())
        return await outcome()
