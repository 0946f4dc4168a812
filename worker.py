"""The Temporal worker: one registry of workflows and activities, which the tests use too."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

from temporalio.client import Client
from temporalio.service import RPCError
from temporalio.worker import Worker

from activities.events import EventActivities
from activities.ledger import LedgerActivities
from db.session import Database, DatabaseUnavailable
from domain import limits
from domain.clock import Clock, system_clock
from domain.events.retries import RetryPolicy
from domain.logs import configure_logging
from settings import Settings, get_settings
from workflows import queues
from workflows.event_processing import EventProcessing
from workflows.gateway import Gateway, connect, register_search_attributes
from workflows.ledger_verification import LedgerVerification, NightlyVerification
from workflows.reconcile import find_lost_wakes, reconcile
from workflows.schedules import ensure_schedules

logger = logging.getLogger("scrip.worker")

WORKFLOWS: Sequence[type] = (EventProcessing, LedgerVerification, NightlyVerification)


def build_worker(client: Client, settings: Settings, clock: Clock, executor: ThreadPoolExecutor) -> Worker:
    """A worker that serves every queue with every workflow and activity. `executor` bounds the drains at once."""
    events = EventActivities(
        settings.database_url.get_secret_value(),
        clock,
        RetryPolicy(settings.max_attempts, settings.retry_schedule_s),
    )
    ledger = LedgerActivities(settings.database_url.get_secret_value(), clock)
    activities: list[Any] = [
        events.drain_events,
        events.set_processing_paused,
        ledger.begin_verification,
        ledger.verify_entries,
        ledger.abandon_verification,
        ledger.list_organizations,
    ]
    return Worker(
        client,
        task_queue=queues.LEDGER,
        workflows=WORKFLOWS,
        activities=activities,
        activity_executor=executor,
        max_concurrent_activities=settings.worker_drains,
        graceful_shutdown_timeout=timedelta(seconds=15),
    )


async def keep_reconciled(database: Database, gateway: Gateway) -> None:
    """Start what is missing now, then look for lost wakes every two seconds. Never returns."""
    look = reconcile
    while True:
        try:
            if woken := await look(database, gateway):
                logger.info("woke the event processing of %d programs", woken)
            look = find_lost_wakes
        except (DatabaseUnavailable, RPCError, RuntimeError) as error:
            logger.warning("looking for lost wakes failed, trying again: %s", error)
        await asyncio.sleep(limits.LOST_WAKE_INTERVAL_S)


async def run(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM; activities under way get 15 seconds to finish."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    client = await _connect(settings, stop)
    if client is None:
        return
    await register_search_attributes(client)
    await ensure_schedules(client)
    database = Database(settings.database_url.get_secret_value(), size=2, timeout_s=10, clock=system_clock)
    await database.open()
    gateway = Gateway.from_settings(settings)
    executor = ThreadPoolExecutor(settings.worker_drains, thread_name_prefix="drain")
    timer = asyncio.create_task(keep_reconciled(database, gateway))
    async with build_worker(client, settings, system_clock, executor):
        if settings.worker_ready_file is not None:
            settings.worker_ready_file.touch()
        logger.info("worker is polling")
        await stop.wait()
        logger.info("worker is stopping")
    timer.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await timer
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
    """The process behind `scrip worker`."""
    settings = get_settings()
    configure_logging(settings.log_level, settings.log_format)
    asyncio.run(run(settings))
    # The SDK's native threads can crash a Python that tears itself down under them, so leave without tearing down.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
