"""What the load generator is asked to do and what it reports; `run_load` gives it a process of its own.

The bytes of every request are made before the clock starts, so that what the client spends while it measures is
writing and reading sockets. Its share of a core is reported with the figures: a client that is busy measures itself.
"""

import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]

CLIENT_CPU_SHARE_LIMIT = 0.40
LOAD_LIMIT_S = 900
CLIENTS_LIMIT = 256


class LoadFailed(Exception):
    """The load generator could not do what it was asked; the message says what the server answered."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where requests go, and the API key they carry."""

    host: str
    port: int
    key: str

    def post(self, path: str, body: bytes) -> bytes:
        """A POST of JSON, byte by byte as it is sent."""
        return self._request("POST", path, body)

    def put(self, path: str, body: bytes) -> bytes:
        """A PUT of JSON, byte by byte as it is sent."""
        return self._request("PUT", path, body)

    def get(self, path: str) -> bytes:
        """A GET, byte by byte as it is sent."""
        return self._request("GET", path, b"")

    def _request(self, method: str, path: str, body: bytes) -> bytes:
        head = (
            f"{method} {path} HTTP/1.1\r\n"
            f"Host: {self.host}:{self.port}\r\n"
            f"Authorization: Bearer {self.key}\r\n"
            "Content-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode("ascii") + body


@dataclass(frozen=True, slots=True)
class Burst:
    """Requests that `clients` connections send as fast as they are answered, each client one at a time.

    With `until_empty` the run ends when every one of these list requests has answered an empty page, asked every
    `poll_ms` after the last answer. `expected_status` is what every answer must have.
    """

    endpoint: Endpoint
    requests: Sequence[bytes]
    clients: int
    expected_status: int
    until_empty: Sequence[bytes] = ()
    poll_ms: float = 50.0
    keep_bodies: bool = False


@dataclass(frozen=True, slots=True)
class BurstReport:
    """What a burst took. `answered_s` and `done_s` count from the first request: to the last answer, and to the end.

    `latencies_ms` and `bodies` (when kept) are in the order of the requests.
    """

    answered_s: float
    done_s: float
    cpu_s: float
    latencies_ms: Sequence[float]
    bodies: Sequence[bytes] = ()

    @property
    def client_cpu_share(self) -> float:
        """Share of one core that the client took while it sent requests."""
        return self.cpu_s / self.answered_s


@dataclass(frozen=True, slots=True)
class Watch:
    """Events sent at given instants, each looked at until it is COMPLETED.

    `sends` pairs the seconds after the start with the request; `look_at` turns the event's id into the request that
    shows it, by replacing `EVENT_ID`. An event is looked at every `poll_ms`.
    """

    endpoint: Endpoint
    sends: Sequence[tuple[float, bytes]]
    look_at: bytes
    poll_ms: float = 5.0


EVENT_ID = b"00000000-0000-0000-0000-000000000000"


@dataclass(frozen=True, slots=True)
class WatchReport:
    """`waits_ms`: from the 202 of each event to the first answer that showed it COMPLETED."""

    wall_s: float
    cpu_s: float
    waits_ms: Sequence[float] = field(default_factory=tuple)

    @property
    def client_cpu_share(self) -> float:
        """Share of one core that the client took."""
        return self.cpu_s / self.wall_s


def offer(burst: Burst) -> BurstReport:
    """Send a burst from a process of its own. Raises LoadFailed."""
    report = _run_load(burst)
    assert isinstance(report, BurstReport)
    return report


def watch(job: Watch) -> WatchReport:
    """Send and watch events from a process of its own. Raises LoadFailed."""
    report = _run_load(job)
    assert isinstance(report, WatchReport)
    return report


def _run_load(job: Burst | Watch) -> object:
    # Both ends are this program, so pickle reads nothing that somebody else wrote.
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.generator"],
        input=pickle.dumps(job),
        capture_output=True,
        cwd=ROOT,
        timeout=LOAD_LIMIT_S,
        check=False,
    )
    if process.returncode != 0:
        raise LoadFailed(process.stderr.decode(errors="replace").strip()[-2_000:])
    return pickle.loads(process.stdout)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of `values` that at least `percent` of them do not exceed (nearest rank)."""
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(int(rank), 1) - 1]


def middle(values: Sequence[float]) -> float:
    """The median: what a benchmark that was repeated reports."""
    return median(values)
