"""The whole system as a user starts it: one `scrip up` for all tests of a run that need it."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.servers import _shared

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
    def ready_file(self) -> Path:
        return self.directory / "ready.json"

    @property
    def data_dir(self) -> Path:
        return self.directory / ".scrip"


@pytest.fixture(scope="session", name="system")
def running_system(run_directory: Path) -> Iterator[System]:
    """The run's system. Tests share its one organization, so each makes a program of its own."""
    directory = run_directory / "system"
    with _shared(run_directory, "system", lambda: _running(directory)) as facts:
        yield System(directory, facts["api_url"], facts["api_key"])


@contextmanager
def _running(directory: Path) -> Iterator[dict[str, str]]:
    directory.mkdir()
    ready_file = directory / "ready.json"
    words = ["--data-dir", str(directory / ".scrip"), "--ready-file", str(ready_file)]
    words += [word for option in ("--api-port", "--temporal-port", "--ui-port") for word in (option, "0")]
    with (directory / "output").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "cli", "up", *words], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while not ready_file.exists():
            assert process.poll() is None, (directory / "output").read_text()
            assert time.monotonic() < deadline, "scrip up did not become ready"
            time.sleep(0.05)
        yield json.loads(ready_file.read_text())
    finally:
        process.terminate()
        process.wait(STOP_LIMIT_S)
