"""Fault points: named places where a test or a drill can kill, stall or fail the process. Off unless armed.

`SCRIP_FAULTS` arms them for a process, e.g. `batch.written=kill@3,batch.locked=stall:20` (kill at the third time, stall
for 20 seconds at the first); `event.applying[alice]=kill` strikes only at that subject. Tests arm them in their own
process with `arm`. Each armed fault fires once. An unarmed point costs one look at an empty dict.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

POINTS = (
    "ingest.stored",  # an event is inserted, its transaction not committed
    "wake.sending",  # a committed event is about to wake its workflow
    "drain.promised",  # a drain has promised to look for events
    "batch.locked",  # a batch holds the locks of its holders
    "event.applying",  # an event is about to be applied in memory; its subject is the participant's external id
    "batch.applied",  # the batch is applied in memory, nothing written
    "batch.written",  # everything is written, the commit not sent
    "batch.committed",  # the batch is committed, nobody told
    "drain.withdrawn",  # the promise is withdrawn, the last look not taken
    "ledger.written",  # the postings of an operation or a batch are written, their entries not sealed
    "hold_ends.written",  # ends of holds are written, the commit not sent; its subject is who carries them
    "hold_ends.committed",  # ends of holds are committed, nobody told; likewise
    "due_lots.written",  # maturities or expiries are written, the commit not sent; its subject is MATURITY or EXPIRY
    "due_lots.committed",  # maturities or expiries are committed, nobody told; likewise
    "automations.released",  # due automations have become events, the transaction not committed
    "fan_out.written",  # a batch of a fan-out is written, the commit not sent
    "fan_out.committed",  # a batch of a fan-out is committed, nobody told
    "simulation.played",  # a batch of a simulation is played and its holders are written, its cursor is not
    "simulation.written",  # a batch of a simulation is written, the commit not sent
    "simulation.committed",  # a batch of a simulation is committed, nobody told
    "redemption.reserved",  # a redemption is reserved, the commit not sent
    "redemption.confirmed",  # a redemption is confirmed, the commit not sent
    "redemption.canceled",  # a redemption is canceled, the commit not sent
    "redemption.expired",  # a redemption has expired, the commit not sent
    "redemption.reversed",  # a two-step redemption is reversed, the commit not sent
    "redemption.committed",  # one of these is committed, its workflow not told
)
"""Every fault point there is; `reach` with another name is an error."""


class InjectedFault(Exception):
    """What a point armed with `fail` raises."""


@dataclass(slots=True)
class _Fault:
    action: Literal["kill", "stall", "fail"]
    seconds: float = 0.0
    at_pass: int = 1


_armed: dict[str, _Fault] = {}


def parse(text: str) -> dict[str, _Fault]:
    """The faults in `point[subject]=action[:seconds][@pass]`, separated by commas; only point and action are needed.

    Raises ValueError for anything else.
    """
    faults = {}
    for part in filter(None, text.split(",")):
        point, _, order = part.partition("=")
        order, _, at_pass = order.partition("@")
        action, _, seconds = order.partition(":")
        name, bracket, subject = point.partition("[")
        if name not in POINTS or (bracket and not subject.endswith("]")) or action not in ("kill", "stall", "fail"):
            raise ValueError(f"no such fault: {part!r}")
        faults[point] = _Fault(action, float(seconds or 0), int(at_pass or 1))  # type: ignore[arg-type]
    return faults


@contextmanager
def arm(text: str) -> Iterator[None]:
    """Arm faults in this process for the length of a block."""
    _armed.update(parse(text))
    try:
        yield
    finally:
        _armed.clear()


async def reach(point: str, subject: str | None = None) -> None:
    """Pass a fault point, busy with `subject`. Raises InjectedFault where it is armed with `fail`."""
    if not _armed:
        return
    assert point in POINTS, point
    if point not in _armed:
        point = f"{point}[{subject}]"
    fault = _armed.get(point)
    if fault is None:
        return
    fault.at_pass -= 1
    if fault.at_pass > 0:
        return
    del _armed[point]
    print(f"fault point {point}: {fault.action}", file=sys.stderr, flush=True)
    if fault.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.action == "stall":
        await asyncio.sleep(fault.seconds)
    else:
        raise InjectedFault(point)


_armed.update(parse(os.environ.get("SCRIP_FAULTS", "")))
