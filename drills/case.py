"""What a drill is: cases that break a running platform, each of which ends with the proof that nothing happened.

A new drill is one module in this package with a `DRILL`, named in `drills/catalog.py`; the command and the table follow
from it.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from drills.platform import Platform


class Broken(Exception):
    """The platform did something that it promises never to do, or did not recover in time."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much each drill does. The short form is the one that runs with the tests."""

    point_events: int = 1_500
    crash_events: int = 20_000
    lost_temporal_events: int = 3_000
    poison_events: int = 400
    same_keys_rounds: int = 60
    same_keys_clients: int = 6
    contention_s: float = 60.0
    redemptions: int = 300
    pending_redemptions: int = 1_000
    expiry_s: float = 45.0
    stall_s: float = 15.0
    due_events: int = 1_500
    due_in_s: float = 20.0
    batch_to_strike: int = 2


SHORT = Sizes(
    point_events=240,
    crash_events=1_500,
    lost_temporal_events=240,
    poison_events=100,
    same_keys_rounds=5,
    same_keys_clients=3,
    contention_s=3.0,
    redemptions=30,
    pending_redemptions=30,
    expiry_s=6.0,
    stall_s=3.0,
    due_events=180,
    due_in_s=10.0,
    batch_to_strike=1,
)


@dataclass(frozen=True, slots=True)
class Finding:
    """What a case that held showed: how many events, how many faults, and how long until no event waited any more.

    `recovered_s` counts from the (last) fault; None where nothing was taken away.
    """

    events: int
    faults: int
    recovered_s: float | None
    note: str = ""


Say = Callable[[str], None]
"""Tells whoever watches what the case is doing now."""


@dataclass(frozen=True, slots=True)
class Case:
    """One thing that is broken. `run` raises Broken when the platform did not hold; `title` says what is done."""

    name: str
    title: str
    run: Callable[[Platform, Sizes, Say], Awaitable[Finding]]


@dataclass(frozen=True, slots=True)
class Drill:
    """Cases that belong together and may share one platform, in order."""

    name: str
    title: str
    cases: Sequence[Case]
