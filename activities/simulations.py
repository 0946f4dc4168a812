"""Activities of simulations. Contract: README.md "Simulations"; docs/simulations.md."""

import contextlib
import logging
import time
from dataclasses import dataclass
from uuid import UUID

from temporalio import activity

from activities.threads import ThreadDatabases
from db.session import Database
from domain import faults, limits
from domain.events.drain import TRANSIENT
from domain.simulations import records
from domain.simulations.batches import Advance, advance, learn_rules
from domain.simulations.beginnings import TooMuchToSimulate

logger = logging.getLogger("scrip.simulations")

_GONE = Advance("CANCELED", 0, 0)


@dataclass(frozen=True)
class SimulationStep:
    """Which simulation to carry on."""

    organization_id: UUID
    simulation_id: UUID


@dataclass(frozen=True)
class SimulationReport:
    """How a simulation stands. When it is `finished` nothing is left to be done for it."""

    status: records.Status
    events_done: int
    events_total: int
    finished: bool
    error: str | None = None


class SimulationActivities:
    """The steps of a simulation. They run in threads: a batch is computation, and heartbeats and workflow tasks must go
    on beside it.
    """

    def __init__(self, databases: ThreadDatabases) -> None:
        self._databases = databases

    # Without this a cancellation is thrown into the thread at any point, also between a write and its commit.
    @activity.defn(name="simulate", no_thread_cancel_exception=True)
    def simulate(self, step: SimulationStep) -> SimulationReport:
        """Simulate batch after batch, a transaction each, for ten seconds at most, or clear away what has ended.

        What is wrong with the simulation itself ends it as FAILED. Raises what is wrong with the database; Temporal
        repeats the activity, which goes on behind the last committed batch. A simulation that has brought its worker
        down three times ends as FAILED.
        """
        attempt = activity.info().attempt
        return self._databases.run(lambda database: self._simulate(database, step, is_repeated=attempt > 1))

    @activity.defn(name="cancel_simulation", no_thread_cancel_exception=True)
    def cancel_simulation(self, step: SimulationStep) -> None:
        """Cancel the simulation, the batch in work included; one that has ended stays as it is."""
        self._databases.run(lambda database: self._cancel(database, step))

    async def _simulate(self, database: Database, step: SimulationStep, *, is_repeated: bool) -> SimulationReport:
        if is_repeated and await self._note_start(database, step, 1) > limits.LOST_STARTS:
            await self._fail(database, step, f"simulating brought its worker down {limits.LOST_STARTS} times")
        try:
            return await self._carry_on(database, step)
        except TRANSIENT:
            # The worker is alive, so this start is none of those that count.
            with contextlib.suppress(*TRANSIENT):
                await self._note_start(database, step, -1)
            raise
        except TooMuchToSimulate as error:
            await self._fail(database, step, str(error))
        except Exception as error:
            logger.exception("a simulation failed", extra={"simulation_id": str(step.simulation_id)})
            await self._fail(database, step, f"simulating failed: {type(error).__name__}")
        return await self._carry_on(database, step)

    async def _carry_on(self, database: Database, step: SimulationStep) -> SimulationReport:
        ends_at = time.monotonic() + limits.SIMULATION_S
        beat = _Beat()
        await learn_rules(database, step.organization_id, step.simulation_id, beat)
        await database.repeat(step.organization_id, lambda tx: records.wait_for_batches(tx, step.simulation_id))
        while True:
            try:
                async with database.transaction(step.organization_id) as tx:
                    done = await advance(tx, step.simulation_id, beat) or _GONE
            except records.Ended:
                continue
            await faults.reach("simulation.committed")
            beat()
            if done.status not in records.OPEN:
                return await self._clear(database, step, done, ends_at, beat)
            if time.monotonic() > ends_at or activity.is_cancelled() or activity.is_worker_shutdown():
                return _report(done, finished=False)

    async def _clear(
        self, database: Database, step: SimulationStep, done: Advance, ends_at: float, beat: "_Beat"
    ) -> SimulationReport:
        """Clear away what the simulation kept of holders, as far as time goes."""
        more = True
        while more and time.monotonic() < ends_at:
            more = await database.repeat(step.organization_id, lambda tx: records.clear(tx, step.simulation_id))
            beat()
        return _report(done, finished=not more)

    async def _fail(self, database: Database, step: SimulationStep, error: str) -> None:
        await database.repeat(step.organization_id, lambda tx: records.end(tx, step.simulation_id, "FAILED", error))

    async def _note_start(self, database: Database, step: SimulationStep, change: int) -> int:
        return await database.repeat(
            step.organization_id, lambda tx: records.note_start(tx, step.simulation_id, change)
        )

    async def _cancel(self, database: Database, step: SimulationStep) -> None:
        await database.repeat(step.organization_id, lambda tx: records.cancel(tx, step.simulation_id))


class _Beat:
    """Tells Temporal that the activity is alive: once a second, however often it is called, as telling costs too."""

    def __init__(self) -> None:
        self._told_at = time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self._told_at > 1:
            self._told_at = time.monotonic()
            activity.heartbeat()


def _report(done: Advance, *, finished: bool) -> SimulationReport:
    return SimulationReport(done.status, done.events_done, done.events_total, finished, done.error)
