"""A limit on how many events may wait: beyond it ingestion answers 429 and the client comes back later.

Counting a long queue on every request would make a bad moment worse. So each organization that sends events is counted
in the background, at most every two seconds; the limit may be overshot by what comes in between.
"""

import asyncio
import logging
from uuid import UUID

from api.rate_limits import TooManyRequests
from db.session import Database, DatabaseUnavailable
from domain.events.control import waiting_events

logger = logging.getLogger("scrip.backlog")

_INTERVAL_S = 2.0
_RETRY_AFTER_S = 5


class BacklogGauge:
    """Which organizations have too many events waiting. Used from one event loop."""

    def __init__(self, database: Database, limit: int) -> None:
        self._database = database
        self._limit = limit
        self._full: set[UUID] = set()
        self._counting: dict[UUID, asyncio.Task[None]] = {}

    def admit(self, organization_id: UUID) -> None:
        """Let new events of this organization in. Raises TooManyRequests while its backlog is over the limit."""
        if organization_id not in self._counting:
            self._counting[organization_id] = asyncio.create_task(self._count(organization_id))
        if organization_id in self._full:
            raise TooManyRequests("too many events are waiting to be processed", _RETRY_AFTER_S)

    def close(self) -> None:
        """Stop counting."""
        for task in self._counting.values():
            task.cancel()

    async def _count(self, organization_id: UUID) -> None:
        try:
            async with self._database.transaction(organization_id) as tx:
                waiting = await waiting_events(tx, self._limit)
            if waiting >= self._limit:
                self._full.add(organization_id)
            else:
                self._full.discard(organization_id)
        except DatabaseUnavailable as error:
            logger.warning("the backlog was not counted: %s", error)
        except Exception:
            logger.exception("the backlog was not counted")
        finally:
            await self._rest(organization_id)

    async def _rest(self, organization_id: UUID) -> None:
        try:
            await asyncio.sleep(_INTERVAL_S)
        finally:
            # Whatever went wrong, the next event counts anew.
            del self._counting[organization_id]
