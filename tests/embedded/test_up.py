"""Goal: one command brings everything up, survives the death of its parts, and leaves nothing running.

Method: the real `scrip up` as a process of its own, on free ports and a directory of the test.
"""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
import pytest

from embedded.child import PACKAGE_ROOT
from embedded.datadir import serving
from embedded.records import stop_leftovers

WAIT_LIMIT_SECONDS = 120
FREE_PORTS = ("--api-port", "0", "--temporal-port", "0", "--ui-port", "0")


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WAIT_LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.05)


def answers(url: str, key: str | None = None) -> int:
    """Return the status of a GET, 0 when nothing listens."""
    try:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.get(url, headers=headers, timeout=5).status_code
    except httpx.TransportError:
        return 0


class Scrip:
    """Starts of `scrip up` on one data directory."""

    def __init__(self, root: Path) -> None:
        self.data_dir = root / "data"
        self.ready_file = root / "ready.json"
        self.output = root / "output"
        self.process: subprocess.Popen[bytes] | None = None

    def run(self, *arguments: str) -> "subprocess.Popen[bytes]":
        """Start the command and return its process; its output goes to a file."""
        words = ("--data-dir", str(self.data_dir), "--ready-file", str(self.ready_file), *(arguments or FREE_PORTS))
        with self.output.open("wb") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "cli", "up", *words], cwd=PACKAGE_ROOT, stdout=output, stderr=subprocess.STDOUT
            )

    def start(self) -> dict[str, str]:
        """Start everything and return the ready file."""
        stale = self.ready_version()
        self.process = process = self.run()
        until(lambda: self.ready_version() not in (None, stale) or process.poll() is not None)
        assert process.poll() is None, self.output.read_text()
        facts: dict[str, str] = json.loads(self.ready_file.read_text())
        return facts

    def ready_version(self) -> int | None:
        """Return what tells one ready file from the next, None when there is none."""
        try:
            return self.ready_file.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(WAIT_LIMIT_SECONDS)

    def pid_of(self, name: str) -> int:
        """Return the pid of a running child."""
        children = json.loads((self.data_dir / "children.json").read_text())["children"]
        return next(int(child["pid"]) for child in children if child["name"] == name)

    def descendants(self) -> list[psutil.Process]:
        """Return every process below `scrip up`."""
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture
def scrip(tmp_path: Path) -> Iterator[Scrip]:
    scrip = Scrip(tmp_path)
    yield scrip
    if scrip.process is not None and scrip.process.poll() is None:
        scrip.stop()
    # A test that failed after it had killed the supervisor must not leave its children to the machine.
    stop_leftovers(scrip.data_dir / "children.json")


def running(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def test_everything_serves_stops_without_a_trace_and_keeps_its_data(scrip: Scrip) -> None:
    ready = scrip.start()

    assert set(ready) == {
        "api_url",
        "api_key",
        "organization_id",
        "temporal_address",
        "temporal_ui_url",
        "database_url",
    }
    assert stat.S_IMODE(scrip.ready_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(scrip.data_dir.stat().st_mode) == 0o700
    assert answers(f"{ready['api_url']}/readyz") == 200
    assert answers(f"{ready['api_url']}/docs") == 200
    assert answers(f"{ready['api_url']}/v1/programs", ready["api_key"]) == 200
    assert answers(f"{ready['api_url']}/v1/programs") == 401
    assert answers(ready["temporal_ui_url"]) == 200
    with psycopg.connect(ready["database_url"]) as connection:
        assert connection.execute("SELECT current_user::text").fetchone() == ("scrip_app",)
    assert serving(scrip.data_dir) is not None
    assert ready["api_key"] not in scrip.output.read_text()

    processes = scrip.descendants()
    assert scrip.stop() == 0
    assert running(processes) == []
    assert not scrip.ready_file.exists()
    assert serving(scrip.data_dir) is None

    again = scrip.start()
    assert (again["api_key"], again["organization_id"]) == (ready["api_key"], ready["organization_id"])
    assert answers(f"{again['api_url']}/v1/programs", again["api_key"]) == 200
    assert scrip.stop(signal.SIGINT) == 0


def test_dead_children_come_back_and_a_killed_supervisor_is_cleaned_up_after(scrip: Scrip) -> None:
    ready = scrip.start()

    second = scrip.run()
    assert second.wait(WAIT_LIMIT_SECONDS) == 2
    assert "Another `scrip up`" in scrip.output.read_text()
    assert answers(f"{ready['api_url']}/readyz") == 200

    for name in ("api", "postgres"):
        killed = scrip.pid_of(name)
        os.kill(killed, signal.SIGKILL)
        until(lambda name=name, killed=killed: scrip.pid_of(name) != killed)  # type: ignore[misc]
        until(lambda: answers(f"{ready['api_url']}/readyz") == 200)

    left = scrip.descendants()
    assert scrip.process is not None
    scrip.process.kill()
    scrip.process.wait()
    assert running(left) != []
    # As if the kill had come between the making of the first key and its keeping.
    (scrip.data_dir / "credentials.json").unlink()

    again = scrip.start()
    assert running(left) == []
    assert again["organization_id"] == ready["organization_id"]
    assert answers(f"{again['api_url']}/v1/programs", again["api_key"]) == 200
    assert scrip.stop(signal.SIGHUP) == 0


@pytest.mark.parametrize("option", ["--api-port", "--temporal-port", "--ui-port"])
def test_a_taken_port_is_told_by_the_name_of_its_option(scrip: Scrip, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = scrip.run(*FREE_PORTS, option, str(taken.getsockname()[1]))
        assert process.wait(WAIT_LIMIT_SECONDS) == 2
    assert option in scrip.output.read_text()
    assert not scrip.ready_file.exists()


def test_a_directory_that_is_not_ours_is_refused_and_left_alone(scrip: Scrip) -> None:
    scrip.data_dir.mkdir()
    (scrip.data_dir / "thesis.txt").write_text("not yours")
    assert scrip.run().wait(WAIT_LIMIT_SECONDS) == 2
    assert "--data-dir" in scrip.output.read_text()
    assert [path.name for path in scrip.data_dir.iterdir()] == ["thesis.txt"]


def test_a_start_that_fails_leaves_nothing_running(scrip: Scrip) -> None:
    (scrip.data_dir / "postgres").mkdir(parents=True)
    (scrip.data_dir / "SCRIP_DATA").touch()
    (scrip.data_dir / "postgres" / "not-a-database").touch()
    assert scrip.run().wait(WAIT_LIMIT_SECONDS) == 1
    assert not [
        process for process in psutil.process_iter(["cmdline"]) if str(scrip.data_dir) in str(process.info["cmdline"])
    ]
