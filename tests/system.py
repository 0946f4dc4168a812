"""The whole system as a user starts it: one `scrip up` for all tests of a run that need it."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.shared import shared

ROOT = Path(__file__).parent.parent
START_LIMIT_S = 180


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

    def start() -> tuple[int, dict[str, str]]:
        pid = _start(directory)
        return pid, json.loads((directory / "ready.json").read_text())

    with shared(directory, start, signal.SIGTERM) as facts:
        yield System(directory, facts["api_url"], facts["api_key"])


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
