"""Which processes run, written down so that a later start can stop what a killed supervisor left behind.

A process is known by its pid and its start time together: the kernel gives pids out again, and a process that merely
has the number of one of ours is never touched.
"""

import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from embedded.child import Child
from embedded.files import read_json_object, write_private_json

# The start time is computed from the wall clock, which may have been set since.
START_TIME_TOLERANCE_SECONDS = 1.0


@dataclass(frozen=True)
class Record:
    """A process that was started: its identity and how it wants to be stopped."""

    name: str
    pid: int
    create_time: float
    layer: int
    stop_signal: int
    grace_seconds: float

    def process(self) -> psutil.Process | None:
        """Return the process if it still runs; None when it has ended or its pid belongs to another one now."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.create_time) <= START_TIME_TOLERANCE_SECONDS
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


class Records:
    """The list of running children, kept in one file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._records: dict[str, Record] = {}

    def add(self, child: Child, pid: int) -> None:
        """Remember that `child` runs as `pid`, in place of an earlier process of that name."""
        try:
            create_time = psutil.Process(pid).create_time()
        except psutil.NoSuchProcess:
            return
        self._records[child.name] = Record(
            child.name, pid, create_time, child.layer, int(child.stop_signal), child.grace_seconds
        )
        self._save()

    def clear(self) -> None:
        """Forget all: everything has ended."""
        self._records.clear()
        self._path.unlink(missing_ok=True)

    def _save(self) -> None:
        write_private_json(self._path, {"children": [asdict(record) for record in self._records.values()]})


def stop_leftovers(path: Path) -> list[str]:
    """Stop what the records in `path` say is still running and return the names of what was; then forget them.

    Higher layers stop first. Each process gets its stop signal, its grace, then SIGKILL.
    """
    stored: list[dict[str, Any]] = (read_json_object(path) or {}).get("children", [])
    records = [Record(**fields) for fields in stored]
    left = [record for record in records if record.process() is not None]
    for layer in sorted({record.layer for record in left}, reverse=True):
        _stop([record for record in left if record.layer == layer])
    path.unlink(missing_ok=True)
    return [record.name for record in left]


def _stop(records: list[Record]) -> None:
    for record in records:
        _send(record, record.stop_signal)
    deadline = time.monotonic() + max(record.grace_seconds for record in records)
    while any(record.process() for record in records) and time.monotonic() < deadline:
        time.sleep(0.05)
    for record in records:
        _send(record, signal.SIGKILL)
    while any(record.process() for record in records):
        time.sleep(0.05)


def _send(record: Record, number: int) -> None:
    process = record.process()
    if process is None:
        return
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
