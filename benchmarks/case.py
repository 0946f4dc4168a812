"""What a case is: one thing that is measured, in a module of its own below `benchmarks/cases/`.

A new case is one module with a `CASE`, named in `benchmarks/cases/__init__.py`; the command, the table and the JSON
follow from it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.load import CLIENT_CPU_SHARE_LIMIT
from benchmarks.rest import Rest
from benchmarks.system import Servers, System
from benchmarks.workload import BenchProgram, Population

Unit = Literal["/s", "ms", "s", "MB", "x", "cores", ""]


class Wrong(Exception):
    """The system did something else than what is being measured, so there is no figure."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One number. `name` is flat and stable; `spread` holds the values of each repetition, when there were several.

    `client_cpu_share` of the load generator decides whether the figure is valid; None where it sent nothing.
    """

    name: str
    value: float
    unit: Unit
    spread: tuple[float, ...] = ()
    client_cpu_share: float | None = None

    @property
    def is_valid(self) -> bool:
        """False when the load generator was so busy that it may have measured itself."""
        return self.client_cpu_share is None or self.client_cpu_share <= CLIENT_CPU_SHARE_LIMIT


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much each case does."""

    repetitions: int
    warm_up_events: int
    batch_events: int
    single_events: int
    latency_events: int
    adjusts: int
    workflows: int
    programs: int


HEADLINE = Sizes(
    repetitions=3,
    warm_up_events=2_000,
    batch_events=20_000,
    single_events=6_000,
    latency_events=300,
    adjusts=4_000,
    workflows=600,
    programs=20,
)
QUICK = Sizes(
    repetitions=1,
    warm_up_events=1_000,
    batch_events=2_000,
    single_events=500,
    latency_events=30,
    adjusts=300,
    workflows=50,
    programs=3,
)


@dataclass(slots=True)
class Bench:
    """What a case works with. `programs` are those of earlier cases, by the case's name; `figures` are theirs.

    `cpu_ms_per_event` has the processor time of each server process, by the name of the case that sent the events.
    """

    system: System
    rest: Rest
    sizes: Sizes
    population: Population
    programs: dict[str, BenchProgram] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    cpu_ms_per_event: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def servers(self) -> Servers:
        """The servers behind the API. Only for a case that `needs_servers`."""
        assert self.system.servers is not None, "the command skips cases that need servers we can't see"
        return self.system.servers


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure: `run` yields exactly the figures that `yields` names.

    `after` names the cases whose programs or figures it uses. Cases with `is_full` run with --full only.
    """

    name: str
    title: str
    yields: tuple[str, ...]
    run: Callable[[Bench], Iterator[Figure]]
    after: tuple[str, ...] = ()
    needs_servers: bool = False
    is_full: bool = False
