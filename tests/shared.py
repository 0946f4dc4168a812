"""Processes that all workers of a test run share: the first who needs one starts it, the last who leaves stops it.

Nobody ever waits for anybody: a worker that kept a server for others would hang while they wait for one of its own.
"""

import fcntl
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

STOP_LIMIT_S = 60


@contextmanager
def shared(
    directory: Path, start: Callable[[], tuple[int, dict[str, str]]], stop_signal: signal.Signals
) -> Iterator[dict[str, str]]:
    """The facts of the process that `start` started, in whichever worker came first.

    `start` returns the process's pid and what others need to know of it; `directory` belongs to this process alone.
    """
    directory.mkdir(exist_ok=True)
    with _locked(directory):
        state = _read(directory)
        if state is None:
            pid, facts = start()
            state = {"pid": pid, "facts": facts, "users": []}
        # One entry for each use: a worker that sees a fixture in two places has two.
        _write(directory, {**state, "users": [*state["users"], os.getpid()]})
    try:
        yield state["facts"]
    finally:
        _leave(directory, stop_signal)


def _leave(directory: Path, stop_signal: signal.Signals) -> None:
    with _locked(directory):
        state = _read(directory)
        assert state is not None
        state["users"].remove(os.getpid())
        users = [pid for pid in state["users"] if psutil.pid_exists(pid)]
        if users:
            _write(directory, {**state, "users": users})
            return
        _stop(state["pid"], stop_signal)
        (directory / "shared.json").unlink()


def _stop(pid: int, stop_signal: signal.Signals) -> None:
    try:
        process = psutil.Process(pid)
        process.send_signal(stop_signal)
        deadline = time.monotonic() + STOP_LIMIT_S
        # One whose parent is another worker stays a zombie until that one ends: then it has stopped too.
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, f"process {pid} did not stop"
            time.sleep(0.05)
    except psutil.NoSuchProcess:
        return


def _read(directory: Path) -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = json.loads((directory / "shared.json").read_text())
    except FileNotFoundError:
        return None
    return state


def _write(directory: Path, state: dict[str, Any]) -> None:
    (directory / "shared.json").write_text(json.dumps(state))


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    with (directory / "shared.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
