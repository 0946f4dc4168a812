"""Every fault point, once with a kill and once with a stall: whatever a process was doing, nothing of it shows."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial

from domain import faults
from drills.audit import moved_on, prove, settled
from drills.case import Broken, Case, Drill, Finding, Say, Sizes
from drills.client import Client, client_of
from drills.platform import Platform, Process
from drills.workload import Program, Sent, make_events, make_program, offer

STRIKE_LIMIT_S = 120.0
SLICES = 10

# What passes the other points is not made by events alone: tests/domain/test_automations.py fails and interrupts there,
# and so does tests/domain/test_simulations.py; drills/redemptions.py and drills/due.py kill there.
_ELSEWHERE = ("automations.", "fan_out.", "redemption.", "hold_ends.", "due_lots.", "simulation.")
POINTS = tuple(point for point in faults.POINTS if not point.startswith(_ELSEWHERE))
API_POINTS = frozenset({"ingest.stored", "wake.sending"})

# At which pass a fault strikes, other than the first, so that something came before it.
PASSES = {"ingest.stored": 5, "event.applying": 100}
BATCH_POINTS = frozenset({"batch.locked", "batch.applied", "batch.written", "batch.committed", "ledger.written"})


async def kill_at(point: str, platform: Platform, sizes: Sizes, say: Say) -> Finding:
    """Kill the process at `point`, start it again at once."""
    process = _process(platform, point)
    await _arm(platform, point, "kill", sizes)
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(client_of(platform))
        program = await make_program(client, f"kill at {point}")
        events = make_events(program, sizes.point_events)
        restarts = await stack.enter_async_context(platform.supervised(process))
        say("sending events")
        first, second = events[: len(events) // 2], events[len(events) // 2 :]
        killed_at = await _during(offer(client, program, first), lambda: bool(restarts), say, point)
        say("killed; sending the rest")
        await offer(client, program, second)
        say("waiting for the last event")
        recovered = await settled(platform, program.id) - killed_at
    say("comparing")
    await prove(platform, program, events)
    if len(restarts) != 1:
        raise Broken(f"{process.name} died {len(restarts)} times instead of once")
    return Finding(len(events), 1, recovered, f"{client.lost} calls lost, {client.unavailable} times 503")


async def stall_at(point: str, platform: Platform, sizes: Sizes, say: Say) -> Finding:
    """Let the process hang at `point` for longer than its heartbeat; for a worker, start a second one beside it."""
    process = _process(platform, point)
    await _arm(platform, point, f"stall:{sizes.stall_s}", sizes)
    async with client_of(platform) as client, asyncio.TaskGroup() as group:
        program = await make_program(client, f"stall at {point}")
        events = make_events(program, sizes.point_events)
        say("sending events")
        sending = group.create_task(offer(client, program, events[: len(events) // 2]))
        stalled_at = await _during(sending, lambda: process.has_reached(point), say, point)
        if process is platform.worker:
            await platform.second_worker.start()
        await sending
        recovered = await _outlast(platform, client, program, events, stalled_at, sizes, say)
    say("comparing")
    await prove(platform, program, events)
    return Finding(len(events), 1, recovered)


async def stall_after_loss(platform: Platform, sizes: Sizes, say: Say) -> Finding:
    """Kill a worker; stall the next attempt, which takes events one by one, so that it overlaps with a third."""
    await platform.provide(worker_faults="batch.locked=kill@2")
    point = "batch.written"
    async with client_of(platform) as client, asyncio.TaskGroup() as group:
        program = await make_program(client, "stall after a loss")
        events = make_events(program, sizes.point_events)
        say("sending events")
        sending = group.create_task(offer(client, program, events[: len(events) // 2]))
        await _during(sending, lambda: platform.worker.pid is None, say, "batch.locked")
        await platform.worker.start(f"{point}=stall:{sizes.stall_s}@20")
        say("killed; waiting for the attempt that will hang")
        stalled_at = await _during(sending, lambda: platform.worker.has_reached(point), say, point)
        await platform.second_worker.start()
        recovered = await _outlast(platform, client, program, events, stalled_at, sizes, say)
    say("comparing")
    await prove(platform, program, events)
    return Finding(len(events), 2, recovered)


async def _outlast(
    platform: Platform,
    client: Client,
    program: Program,
    events: Sequence[Sent],
    stalled_at: float,
    sizes: Sizes,
    say: Say,
) -> float:
    """Send the second half slowly, until long after the stall's end, and wait for the last event.

    Returns the seconds from the stall until as many events as the first half has were done.
    """
    say("stalled; sending the rest slowly, until long after its end")
    half = len(events) // 2
    async with asyncio.TaskGroup() as group:
        caught_up = group.create_task(moved_on(platform, program.id, half))
        await _offer_slowly(client, program, events[half:], stalled_at + sizes.stall_s + 5)
        say("waiting for the last event")
        await settled(platform, program.id)
    return caught_up.result() - stalled_at


def _process(platform: Platform, point: str) -> Process:
    return platform.api if point in API_POINTS else platform.worker


async def _arm(platform: Platform, point: str, action: str, sizes: Sizes) -> None:
    at_pass = sizes.batch_to_strike if point in BATCH_POINTS else PASSES.get(point, 1)
    fault = f"{point}={action}@{at_pass}"
    if point in API_POINTS:
        await platform.provide(api_faults=fault)
    else:
        await platform.provide(worker_faults=fault)


async def _offer_slowly(client: Client, program: Program, events: Sequence[Sent], until: float) -> None:
    """Send `events` in slices spread over the time until the monotonic clock shows `until`."""
    begun = time.monotonic()
    pause = max(until - begun, 0) / SLICES
    size = -(-len(events) // SLICES)
    for turn in range(SLICES):
        await offer(client, program, events[turn * size : (turn + 1) * size])
        await asyncio.sleep(max(begun + (turn + 1) * pause - time.monotonic(), 0))


async def _during(work: Awaitable[None], has_struck: Callable[[], bool], say: Say, point: str) -> float:
    """Wait until the fault has struck while `work` goes on, and for the work; the instant of the strike.

    A task that is handed over is left to the caller. Raises Broken when the fault does not strike.
    """
    is_ours = not isinstance(work, asyncio.Task)
    task = asyncio.ensure_future(work)
    deadline = time.monotonic() + STRIKE_LIMIT_S
    while not has_struck():
        if task.done():
            task.result()
            say(f"sent; waiting for {point} to be reached")
        if time.monotonic() > deadline:
            raise Broken(f"the fault point {point} was not reached within {STRIKE_LIMIT_S:.0f} s")
        await asyncio.sleep(0.02)
    struck_at = time.monotonic()
    if is_ours:
        await task
    return struck_at


DRILL = Drill(
    "points",
    "Every fault point: kill the process there; stall it there while another attempt overlaps",
    (
        *(Case(f"kill {point}", f"kill -9 at {point}", partial(kill_at, point)) for point in POINTS),
        *(Case(f"stall {point}", f"hang at {point}", partial(stall_at, point)) for point in POINTS),
        Case("stall after loss", "kill a worker, then hang in the attempt after it", stall_after_loss),
    ),
)
