"""Telling the workflows that carry on what events began: holds with an end, broadcasts, holds that have ended.

A batch of events costs no Temporal operation for it: a program's followers are woken at once the first time and then at
most every two seconds, however many holds its rules make. What is lost with a process is found by upkeep and reconcile.
"""

import asyncio
import logging
from uuid import UUID

from temporalio.exceptions import TemporalError

from domain import limits
from domain.events.batch import News
from workflows.gateway import Gateway

logger = logging.getLogger("scrip.temporal")


class Followers:
    """Wakes the workflows that follow the events of programs. To be made on the event loop of the gateway."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._loop = asyncio.get_running_loop()
        self._news: dict[UUID, News] = {}
        self._tasks: dict[UUID, asyncio.Task[None]] = {}

    def tell(self, news: News) -> None:
        """Pass on what came of a batch. From any thread; returns at once."""
        self._loop.call_soon_threadsafe(self._take, news)

    def _take(self, news: News) -> None:
        self._gateway.tell_holds_ended(news.ended_holds)
        before = self._news.get(news.program_id)
        self._news[news.program_id] = news if before is None else _merged(before, news)
        if news.program_id not in self._tasks:
            task = asyncio.create_task(self._wake_as_long_as_told(news.program_id))
            self._tasks[news.program_id] = task

    async def _wake_as_long_as_told(self, program_id: UUID) -> None:
        try:
            while news := self._news.pop(program_id, None):
                await self._wake(news)
                await asyncio.sleep(limits.FOLLOWER_WAKE_INTERVAL_S)
        finally:
            del self._tasks[program_id]

    async def _wake(self, news: News) -> None:
        whose = (news.organization_id, news.program_id, news.program_name)
        try:
            if news.has_new_ends:
                await self._gateway.wake_hold_ends(*whose)
            if news.has_broadcasts:
                await self._gateway.wake_broadcasts(*whose)
        except (TemporalError, RuntimeError) as error:
            logger.warning("followers of program %s were not woken, reconcile will: %s", news.program_id, error)


def _merged(first: News, second: News) -> News:
    return News(
        second.organization_id,
        second.program_id,
        second.program_name,
        first.has_new_ends or second.has_new_ends,
        first.has_broadcasts or second.has_broadcasts,
        (),
    )
