"""The whole system as a user starts it: one `scrip up` for all tests of a run that need it."""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parent.parent
START_LIMIT_S = 180
STOP_LIMIT_S = 60


@dataclass(frozen=True)
class System:
    """A running `scrip up`: what its ready file says, and the directory that holds `.scrip` and the file."""

    directory: Path
    api_url: str
    api_key: str

    @property
    def data_dir(self) -> Path:
        return self.directory / ".scrip"


@pytest.fixture(scope="session", name="system")
def running_system(run_directory: Path) -> Iterator[System]:
    """The run's system. Tests share its one organization, so each makes a program of its own."""
    directory = run_directory / "system"
    directory.mkdir(exist_ok=True)
    with _locked(directory):
        state = _read(directory) or {"supervisor": _start(directory), "users": []}
        _write(directory, {**state, "users": [*state["users"], os.getpid()]})
    try:
        facts = json.loads((directory / "ready.json").read_text())
        yield System(directory, facts["api_url"], facts["api_key"])
    finally:
        _leave(directory)


def _start(directory: Path) -> int:
    """Start `scrip up` and return its pid once all of it serves."""
    ready_file = directory / "ready.json"
    words = ["--data-dir", str(directory / ".scrip"), "--ready-file", str(ready_file)]
    words += [word for option in ("--api-port", "--temporal-port", "--ui-port") for word in (option, "0")]
    with (directory / "output").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "cli", "up", *words],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_LIMIT_S
    while not ready_file.exists():
        assert process.poll() is None, (directory / "output").read_text()
        if time.monotonic() > deadline:
            process.terminate()
            raise AssertionError("scrip up did not become ready")
        time.sleep(0.05)
    return process.pid


def _leave(directory: Path) -> None:
    """Stop the system if nobody else uses it: whoever goes last does it, so that nobody waits for anybody."""
    with _locked(directory):
        state = _read(directory)
        assert state is not None
        # One entry of ours: a process that sees this fixture in two modules has two.
        state["users"].remove(os.getpid())
        users = [pid for pid in state["users"] if psutil.pid_exists(pid)]
        if users:
            _write(directory, {**state, "users": users})
            return
        supervisor = psutil.Process(state["supervisor"])
        supervisor.terminate()
        # A supervisor whose parent is another test process stays a zombie until that one ends: then it has stopped too.
        deadline = time.monotonic() + STOP_LIMIT_S
        while supervisor.is_running() and supervisor.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, "scrip up did not stop"
            time.sleep(0.05)
        (directory / "state.json").unlink()


def _read(directory: Path) -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = json.loads((directory / "state.json").read_text())
    except FileNotFoundError:
        return None
    return state


def _write(directory: Path, state: dict[str, Any]) -> None:
    (directory / "state.json").write_text(json.dumps(state))


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    with (directory / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
