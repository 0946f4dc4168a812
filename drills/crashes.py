"""kill -9 of every process, one after another, in the middle of a stream of events."""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Sequence

import psycopg

from drills.audit import moved_on, progress_of, prove, settled
from drills.case import Broken, Case, Drill, Finding, Say, Sizes
from drills.client import Client, client_of
from drills.platform import Platform
from drills.workload import Program, Sent, make_events, make_program, offer

SLICE_EVENTS = 600
BACKLOG_EVENTS = 2_000


async def run(platform: Platform, sizes: Sizes, say: Say) -> Finding:
    """Kill worker, API, Postgres, one of its backends and Temporal while events come in and are processed."""
    await platform.provide()
    processes = (platform.worker, platform.api, platform.postgres, platform.temporal)
    kills: list[tuple[str, Callable[[], object]]] = [
        ("the worker", platform.worker.kill),
        ("the API", platform.api.kill),
        ("Postgres", platform.postgres.kill),
        ("Temporal", platform.temporal.kill),
        ("a backend of Postgres", lambda: _kill_backend(platform)),
    ]
    recovered_s = []
    async with client_of(platform) as client, platform.supervised(*processes) as restarts:
        program = await make_program(client, "crashes")
        events = make_events(program, sizes.crash_events)
        async with asyncio.TaskGroup() as group:
            group.create_task(_stream(platform, client, program, events))
            for number, (victim, kill) in enumerate(kills, start=1):
                mark = len(events) * number // (len(kills) + 1)
                say(f"waiting for event {mark} to kill {victim}")
                await moved_on(platform, program.id, mark)
                killed_at = time.monotonic()
                await asyncio.to_thread(kill)
                say(f"killed {victim}, waiting for events to be processed again")
                await moved_on(platform, program.id, mark + BACKLOG_EVENTS // 10, after=killed_at + 1)
                recovered_s.append(time.monotonic() - killed_at)
        say("waiting for the last event")
        await settled(platform, program.id)
    say("comparing")
    await prove(platform, program, events)
    if len(restarts) != len(processes):
        raise Broken(f"started again: {', '.join(restarts)}; a process died that was not killed")
    note = "each: " + ", ".join(f"{seconds:.0f} s" for seconds in recovered_s)
    return Finding(len(events), len(kills), max(recovered_s), f"{note}; {client.lost} calls lost")


async def _stream(platform: Platform, client: Client, program: Program, events: Sequence[Sent]) -> None:
    """Send `events` in slices, never far ahead of what has been processed, so that each kill meets events in flight."""
    for start in range(0, len(events), SLICE_EVENTS):
        piece = events[start : start + SLICE_EVENTS]
        await offer(client, program, piece)
        await _caught_up(platform, program)


async def _caught_up(platform: Platform, program: Program) -> None:
    progress = None
    while progress is None or progress.waiting > BACKLOG_EVENTS:
        progress = await progress_of(platform, program.id)
        await asyncio.sleep(0.1)


def _kill_backend(platform: Platform) -> None:
    """End one connection's process as the kernel would for want of memory: Postgres then restarts all of itself."""
    with psycopg.connect(platform.superuser_url, autocommit=True) as connection:
        row = connection.execute(
            "select pid from pg_stat_activity where usename = 'scrip_app' and pid <> pg_backend_pid()"
            " order by xact_start nulls last limit 1"
        ).fetchone()
    if row is None:
        raise Broken("there is no connection of the application to end")
    os.kill(row[0], signal.SIGKILL)


DRILL = Drill(
    "crashes",
    "kill -9 of worker, API, Postgres, a backend of Postgres, Temporal, one after another",
    (Case("crashes", "kill -9 of every process while events come in", run),),
)
