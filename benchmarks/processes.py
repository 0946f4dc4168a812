"""What processes take from the machine: processor time and memory, ours and everybody else's."""

import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import psutil

SAMPLE_INTERVAL_S = 0.5


def cpu_s(pid: int) -> float:
    """Processor seconds that a process and its descendants have taken so far, those that have ended included."""
    process = psutil.Process(pid)
    total = 0.0
    for member in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = member.cpu_times()
            # What ended children took is added to their parent once it has collected them.
            total += times.user + times.system + times.children_user + times.children_system
    return total


@dataclass(frozen=True, slots=True)
class Moment:
    """Readings of all processors at one instant, in seconds; `ours` is this process with its descendants."""

    at: float
    busy: float
    ours: float

    @classmethod
    def now(cls) -> "Moment":
        """Read them."""
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        # `guest` is contained in `user`.
        busy = sum(times) - idle - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        return cls(time.monotonic(), busy, cpu_s(os.getpid()))

    def others_since(self, before: "Moment") -> float:
        """How many cores everything that isn't ours kept busy on average since `before`."""
        used = (self.busy - before.busy) - (self.ours - before.ours)
        return max(0.0, used / max(self.at - before.at, 1e-9))


class Watched:
    """The processes of the system under measurement, by name; their memory is sampled while `start`ed."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = pids
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory", daemon=True)
        self.peak_bytes: dict[str, int] = {}

    def start(self) -> None:
        """Take a sample of the memory twice a second from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Take no more samples."""
        self._stop.set()
        self._thread.join()

    def cpu_s(self) -> dict[str, float]:
        """Processor seconds that each of them has taken so far."""
        return {name: cpu_s(pid) for name, pid in self._pids.items()}

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_INTERVAL_S):
            for name, pid in self._pids.items():
                with suppress(psutil.NoSuchProcess):
                    used = psutil.Process(pid).memory_info().rss
                    self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), used)
