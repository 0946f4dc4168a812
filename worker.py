"""The Temporal worker: one registry of workflows and activities, which the tests use too."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any
from uuid import UUID

from temporalio.client import Client
from temporalio.service import RPCError
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from activities.broadcasts import AutomationActivities, FanOutActivities
from activities.events import EventActivities
from activities.holds import DueHoldActivities, HoldActivities
from activities.ledger import LedgerActivities
from activities.redemptions import RedemptionActivities
from activities.simulations import SimulationActivities
from activities.threads import ThreadDatabases
from activities.upkeep import ReconcileActivities, ReconcileReport, UpkeepActivities
from api.waker import Waker
from db.session import Database, DatabaseUnavailable
from domain import limits
from domain.clock import Clock, system_clock
from domain.events.retries import RetryPolicy
from domain.logs import configure_logging
from settings import Settings, get_settings
from workflows import queues
from workflows.broadcasts import Broadcasts
from workflows.event_processing import EventProcessing
from workflows.followers import Followers
from workflows.gateway import Gateway, connect, register_search_attributes
from workflows.hold import Hold
from workflows.hold_ends import HoldEnds
from workflows.ledger_verification import LedgerVerification, NightlyVerification
from workflows.reconcile import (
    find_lost_broadcasts,
    find_lost_wakes,
    reconcile,
    reconcile_broadcasts,
    reconcile_holds,
    reconcile_redemptions,
    reconcile_simulations,
)
from workflows.redemption import Redemption
from workflows.schedules import ensure_schedules
from workflows.simulation import Simulation
from workflows.upkeep import DriftCheck, Reconcile, Upkeep

logger = logging.getLogger("scrip.worker")

WORKFLOWS: Sequence[type] = (
    EventProcessing,
    Broadcasts,
    Hold,
    HoldEnds,
    LedgerVerification,
    NightlyVerification,
    Redemption,
    Simulation,
    Upkeep,
    Reconcile,
    DriftCheck,
)

# The SDK's sandbox loads a workflow's module anew for every run, which takes more than everything else that a run does.
# tests/workflows plays every path of every workflow in it, and replays what was recorded.
_RUNNER = UnsandboxedWorkflowRunner()


class Workers:
    """One Temporal worker per task queue, and the databases of its steps: one on the event loop, one in each thread.

    An asynchronous context: it serves from its beginning to its end.
    """

    def __init__(self, database: Database, databases: ThreadDatabases, waker: Waker, workers: Sequence[Worker]) -> None:
        self._database = database
        self._waker = waker
        self._databases = databases
        self._workers = workers
        self._serving = contextlib.AsyncExitStack()

    async def __aenter__(self) -> "Workers":
        """Open the database and poll."""
        await self._database.open()
        self._serving.push_async_callback(self._database.close)
        self._serving.push_async_callback(self._waker.close)
        for worker in self._workers:
            await self._serving.enter_async_context(worker)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Let activities under way finish, then close the databases."""
        await self._serving.aclose()
        await asyncio.to_thread(self._databases.close)


def build_worker(client: Client, settings: Settings, clock: Clock, executor: ThreadPoolExecutor) -> Workers:
    """Workers that serve every queue with every workflow and activity. `executor` bounds the drains at once.

    To be called on the event loop that they will run on.
    """
    url = settings.database_url.get_secret_value()
    databases = ThreadDatabases(url, clock)
    gateway = _gateway(client, settings)
    retries = RetryPolicy(settings.max_attempts, settings.retry_schedule_s)
    events = EventActivities(databases, retries, Followers(gateway).tell)
    ledger = LedgerActivities(databases)
    due_holds = DueHoldActivities(databases)
    upkeep = UpkeepActivities(databases)
    simulations = SimulationActivities(databases)
    database = Database(url, size=settings.database_pool_size, timeout_s=settings.database_pool_timeout_s, clock=clock)
    waker = Waker(database, gateway)
    fan_outs = FanOutActivities(databases, _from_any_thread(waker))
    in_threads: list[Any] = [
        events.drain_events,
        events.set_processing_paused,
        ledger.begin_verification,
        ledger.verify_entries,
        ledger.abandon_verification,
        ledger.list_organizations,
        due_holds.end_due,
        fan_outs.fan_out,
        simulations.simulate,
        simulations.cancel_simulation,
        upkeep.sweep,
        upkeep.maintain,
        upkeep.find_drift,
    ]
    holds = HoldActivities(database)
    redemptions = RedemptionActivities(database)
    on_the_loop: list[Any] = [
        holds.reserve_hold,
        holds.find_hold,
        holds.end_hold,
        redemptions.reserve,
        redemptions.confirm,
        redemptions.cancel,
        redemptions.reverse,
        redemptions.expire,
        redemptions.find,
        AutomationActivities(database).cancel_automation,
        ReconcileActivities(_reconciler(gateway, database)).reconcile,
    ]
    return Workers(
        database,
        databases,
        waker,
        [
            Worker(
                client,
                task_queue=queues.LEDGER,
                workflows=WORKFLOWS,
                activities=in_threads,
                activity_executor=executor,
                max_concurrent_activities=settings.worker_drains,
                workflow_runner=_RUNNER,
                graceful_shutdown_timeout=timedelta(seconds=15),
            ),
            Worker(
                client,
                task_queue=queues.LIFECYCLE,
                workflows=WORKFLOWS,
                activities=on_the_loop,
                max_concurrent_activities=4 * settings.database_pool_size,
                max_concurrent_local_activities=4 * settings.database_pool_size,
                workflow_runner=_RUNNER,
                graceful_shutdown_timeout=timedelta(seconds=15),
            ),
        ],
    )


def _from_any_thread(waker: Waker) -> Callable[[UUID, UUID], None]:
    """The waker's `wake` for threads of activities: it acts on the event loop that this is called on."""
    loop = asyncio.get_running_loop()

    def wake(organization_id: UUID, program_id: UUID) -> None:
        loop.call_soon_threadsafe(waker.wake, organization_id, program_id)

    return wake


def _gateway(client: Client, settings: Settings) -> Gateway:
    async def connected() -> Client:
        return client

    return Gateway(connected, timeout_s=settings.temporal_timeout_s)


def _reconciler(gateway: Gateway, database: Database) -> Callable[[Callable[[], None]], Awaitable[ReconcileReport]]:
    async def run_reconcile(progress: Callable[[], None]) -> ReconcileReport:
        queues_woken = await reconcile(database, gateway)
        progress()
        holds = await reconcile_holds(database, gateway, progress)
        broadcasts_woken = await reconcile_broadcasts(database, gateway)
        redemptions_started = await reconcile_redemptions(database, gateway, progress)
        simulations_started = await reconcile_simulations(database, gateway)
        return ReconcileReport(
            queues_woken, holds.started, holds.woken, broadcasts_woken, redemptions_started, simulations_started
        )

    return run_reconcile


async def keep_schedules(client: Client) -> None:
    """Make Scrip's schedules now and every five minutes: a Temporal that lost its data has none. Never returns."""
    while True:
        try:
            await ensure_schedules(client)
        except RPCError as error:
            logger.warning("schedules could not be made, trying again: %s", error)
        await asyncio.sleep(limits.SCHEDULES_INTERVAL_S)


async def keep_reconciled(database: Database, gateway: Gateway) -> None:
    """Start what is missing now, then look for lost wakes every two seconds. Never returns."""
    look, look_at_broadcasts = reconcile, reconcile_broadcasts
    while True:
        try:
            if woken := await look(database, gateway):
                logger.info("woke the event processing of %d programs", woken)
            if woken := await look_at_broadcasts(database, gateway):
                logger.info("woke the broadcasts of %d programs", woken)
            look, look_at_broadcasts = find_lost_wakes, find_lost_broadcasts
        except (DatabaseUnavailable, RPCError, RuntimeError) as error:
            logger.warning("looking for lost wakes failed, trying again: %s", error)
        except Exception:
            # Whatever it was: without this loop an event whose wake got lost would wait for ever.
            logger.exception("looking for lost wakes failed, trying again")
        await asyncio.sleep(limits.LOST_WAKE_INTERVAL_S)


async def start_missing_workflows(database: Database, gateway: Gateway) -> None:
    """Start what holds, redemptions and simulations lack in Temporal, once; a schedule does it every five minutes."""
    try:
        redemptions = await reconcile_redemptions(database, gateway)
        logger.info("started the workflows of %d redemptions", redemptions)
        holds = await reconcile_holds(database, gateway)
        logger.info("started the workflows of %d holds, woke HoldEnds of %d programs", holds.started, holds.woken)
        logger.info("started the workflows of %d simulations", await reconcile_simulations(database, gateway))
    except (DatabaseUnavailable, RPCError, RuntimeError) as error:
        logger.warning("looking for missing workflows failed: %s", error)
    except Exception:
        logger.exception("looking for missing workflows failed")


async def serve_until(stop: asyncio.Event, timer: asyncio.Task[None]) -> None:
    """Wait for `stop`. Raises RuntimeError when `timer`, which is never to end, ends before."""
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([stopping, timer], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not stop.is_set():
        raise RuntimeError("the look for lost wakes has ended") from (None if timer.cancelled() else timer.exception())


async def run(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM; activities under way get 15 seconds to finish.

    Raises RuntimeError when the look for lost wakes ends: another process is to take over, not one that is half alive.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    client = await _connect(settings, stop)
    if client is None:
        return
    await register_search_attributes(client)
    database = Database(settings.database_url.get_secret_value(), size=2, timeout_s=10, clock=system_clock)
    await database.open()
    gateway = Gateway.from_settings(settings)
    executor = ThreadPoolExecutor(settings.worker_drains, thread_name_prefix="drain")
    lost_wakes = asyncio.create_task(keep_reconciled(database, gateway))
    once = asyncio.create_task(start_missing_workflows(database, gateway))
    timers = [lost_wakes, once, asyncio.create_task(keep_schedules(client))]
    try:
        async with build_worker(client, settings, system_clock, executor):
            if settings.worker_ready_file is not None:
                settings.worker_ready_file.touch()
            logger.info("worker is polling")
            await serve_until(stop, lost_wakes)
            logger.info("worker is stopping")
    finally:
        for timer in timers:
            timer.cancel()
        await asyncio.gather(*timers, return_exceptions=True)
        await database.close()


async def _connect(settings: Settings, stop: asyncio.Event) -> Client | None:
    """Connect to Temporal, waiting for it to come up; None when asked to stop first."""
    wait_s = 0.2
    while not stop.is_set():
        try:
            return await connect(settings)
        except RuntimeError as error:
            logger.warning("Temporal at %s is out of reach, trying again: %s", settings.temporal_address, error)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), wait_s)
        wait_s = min(wait_s * 2, 5)
    return None


def main() -> None:
    """The process behind `scrip worker`. It exits with 1 when the worker fails."""
    settings = get_settings()
    configure_logging(settings.log_level, settings.log_format)
    status = 0
    try:
        asyncio.run(run(settings))
    except Exception:
        logger.exception("the worker failed")
        status = 1
    # The SDK's native threads can crash a Python that tears itself down under them, so leave without tearing down.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
