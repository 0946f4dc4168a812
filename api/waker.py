"""Waking event processing after a commit, rarely enough to cost nothing. docs/decisions/0005-wakes.md.

The first event of a quiet program wakes its workflow at once; after that at most one wake every 100 ms goes out, and
none while a drain is at work that will find the event by itself. A failed wake never fails a request: the worker's
timer finds events that nobody looks after.
"""

import asyncio
import logging
from dataclasses import dataclass
from uuid import UUID

from temporalio.service import RPCError

from db.session import Database, DatabaseUnavailable
from domain import faults, limits
from domain.events.drain import lane_of
from workflows.gateway import Gateway

logger = logging.getLogger("scrip.waker")


@dataclass(slots=True)
class _Wake:
    task: asyncio.Task[None]
    again: bool = False


class Waker:
    """Sends wakes for programs that have accepted events. Used from one event loop."""

    def __init__(self, database: Database, gateway: Gateway) -> None:
        self._database = database
        self._gateway = gateway
        self._wakes: dict[UUID, _Wake] = {}
        self.sent = 0

    def wake(self, organization_id: UUID, program_id: UUID) -> None:
        """Events of this program have been committed. Returns at once."""
        wake = self._wakes.get(program_id)
        if wake is not None:
            wake.again = True
            return
        task = asyncio.create_task(self._run(organization_id, program_id))
        self._wakes[program_id] = _Wake(task)

    async def close(self) -> None:
        """Let wakes in flight finish, for a second at most."""
        tasks = [wake.task for wake in self._wakes.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=1)

    async def _run(self, organization_id: UUID, program_id: UUID) -> None:
        wake = None
        try:
            while wake is None or wake.again:
                wake = self._wakes[program_id]
                wake.again = False
                await self._send(organization_id, program_id)
                await asyncio.sleep(limits.WAKE_INTERVAL_MS / 1000)
        finally:
            # Whatever went wrong, the next event begins anew.
            del self._wakes[program_id]

    async def _send(self, organization_id: UUID, program_id: UUID) -> None:
        try:
            await faults.reach("wake.sending")
            lane = await lane_of(self._database, organization_id, program_id)
            if lane.is_drained:
                return
            self.sent += 1
            await self._gateway.wake_event_processing(organization_id, program_id, lane.program_name)
        except (RPCError, RuntimeError, DatabaseUnavailable, faults.InjectedFault) as error:
            logger.warning("event processing was not woken; its timer will: %s", error)
        except Exception:
            logger.exception("event processing was not woken; its timer will")
