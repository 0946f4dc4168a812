"""Goal: children are restarted within a budget, stopped in order, and nothing survives, not even a killed supervisor.

Method: real processes that are tiny Python programs; the policy's clock is an argument.
"""

# ruff: noqa: PT012 - leaving the keeper's block is part of what must raise

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from embedded.child import PACKAGE_ROOT, Child, ChildProcess
from embedded.keeper import Keeper, RestartPolicy, StopRequested
from embedded.problems import StartupProblem
from embedded.records import Records, stop_leftovers

WAIT_LIMIT_SECONDS = 30


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WAIT_LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.01)


def runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


class World:
    """A directory in which children leave marks, and a keeper with a quick policy."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.said: list[str] = []
        self.records_path = root / "children.json"

    def keeper(self, limit: int = 5) -> Keeper:
        return Keeper(
            lambda name: self.root / f"{name}.log",
            Records(self.records_path),
            self.said.append,
            lambda: RestartPolicy(first_delay_seconds=0.001, limit=limit),
        )

    def child(self, name: str, body: str = "time.sleep(600)", layer: int = 0) -> Child:
        """A child that appends its pid to `<name>.pids`, then runs `body`."""
        pids = self.root / f"{name}.pids"
        ended = self.root / "ended"
        program = (
            "import os, signal, sys, time\n"
            "def end(*_):\n"
            f"    open({str(ended)!r}, 'a').write('{name}\\n')\n"
            "    os._exit(0)\n"
            "signal.signal(signal.SIGTERM, end)\n"
            f"open({str(pids)!r}, 'a').write(f'{{os.getpid()}}\\n')\n"
            f"{body}\n"
        )
        argv = (sys.executable, "-S", "-c", program)
        return Child(name=name, argv=argv, env={}, ready=lambda: bool(self.pids(name)), layer=layer)

    def pids(self, name: str) -> list[int]:
        path = self.root / f"{name}.pids"
        return [int(line) for line in path.read_text().splitlines()] if path.exists() else []

    def ended(self) -> list[str]:
        path = self.root / "ended"
        return path.read_text().split() if path.exists() else []


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_backoff_doubles_from_half_a_second() -> None:
    policy = RestartPolicy()
    assert [policy.delay_after_death(now) for now in (0, 1, 2, 3, 4)] == [0.5, 1, 2, 4, 8]


def test_the_sixth_death_within_a_minute_gives_up() -> None:
    policy = RestartPolicy()
    for now in range(5):
        policy.delay_after_death(now)
    assert policy.delay_after_death(59) is None


def test_deaths_of_more_than_a_minute_ago_are_forgiven() -> None:
    policy = RestartPolicy()
    for now in range(5):
        policy.delay_after_death(now)
    assert policy.delay_after_death(64.5) == 0.5


def test_children_stop_layer_by_layer_the_highest_first(world: World) -> None:
    with world.keeper() as keeper:
        keeper.start(world.child("database", layer=0))
        keeper.start(world.child("temporal", layer=1))
        keeper.start(world.child("api", layer=2))
        keeper.wait_ready("database", "temporal", "api")
    assert world.ended() == ["api", "temporal", "database"]
    assert not world.records_path.exists()


def test_a_dead_child_is_started_again_and_its_log_shown(world: World) -> None:
    with world.keeper() as keeper:
        body = (
            f"if len(open({str(world.root / 'api.pids')!r}).readlines()) > 1: time.sleep(600)\nsys.exit('out of luck')"
        )
        keeper.start(world.child("api", body))
        run_until(keeper, lambda: len(world.pids("api")) == 2)
    assert "out of luck" in world.said[0]
    assert "Starting api again" in world.said[0]


def test_a_killed_child_is_started_again(world: World) -> None:
    with world.keeper() as keeper:
        keeper.start(world.child("api"))
        keeper.wait_ready("api")
        os.kill(world.pids("api")[0], signal.SIGKILL)
        run_until(keeper, lambda: len(world.pids("api")) == 2)
    assert not any(runs(pid) for pid in world.pids("api"))


def test_a_child_that_does_not_stay_up_stops_everything(world: World) -> None:
    with pytest.raises(StartupProblem, match="api does not stay up"), world.keeper(limit=2) as keeper:
        keeper.start(world.child("database"))
        keeper.wait_ready("database")
        keeper.start(world.child("api", "sys.exit(3)"))
        keeper.watch()
    assert len(world.pids("api")) == 3
    assert world.ended() == ["database"]


def test_a_child_that_dies_while_starting_fails_the_start_with_its_log(world: World) -> None:
    with pytest.raises(StartupProblem, match=r"(?s)worker ended with status 1.*no such luck"), world.keeper() as keeper:
        keeper.start(world.child("database"))
        keeper.start(replace(world.child("worker", "sys.exit('no such luck')"), ready=lambda: False))
        keeper.wait_ready("database", "worker")
    assert not any(runs(pid) for pid in world.pids("database"))


def test_a_child_that_never_gets_ready_fails_the_start(world: World) -> None:
    with pytest.raises(StartupProblem, match="not ready within its time"), world.keeper() as keeper:
        keeper.start(replace(world.child("api"), ready=lambda: False, start_timeout_seconds=0.1))
        keeper.wait_ready("api")


def test_a_missing_program_is_named(world: World) -> None:
    with pytest.raises(StartupProblem, match=r"api cannot be started.*no-such-program"), world.keeper() as keeper:
        keeper.start(replace(world.child("api"), argv=("/no-such-program",)))


def test_a_one_shot_returns_its_output_which_no_log_shows(world: World) -> None:
    with world.keeper() as keeper:
        assert keeper.run_once("bootstrap", [sys.executable, "-c", "print('secret')"], {}) == "secret\n"
    assert "secret" not in (world.root / "bootstrap.log").read_text()


def test_a_one_shot_that_fails_shows_its_errors(world: World) -> None:
    with pytest.raises(StartupProblem, match=r"(?s)migrate ended with status 1.*no table"), world.keeper() as keeper:
        keeper.run_once("migrate", [sys.executable, "-c", "import sys; sys.exit('no table')"], {})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_stop_signal_ends_the_wait_and_stops_the_children(world: World, number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # whoever runs the tests may have it ignored
    try:
        with world.keeper() as keeper:
            keeper.start(world.child("api"))
            keeper.wait_ready("api")
            os.kill(os.getpid(), number)
            keeper.watch()
    finally:
        signal.signal(number, before)
    assert world.ended() == ["api"]


def test_under_nohup_a_hangup_stops_nothing(world: World) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with world.keeper() as keeper:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not keeper.stop_requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_interrupt_stops_also_where_a_script_had_it_ignored(world: World) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with world.keeper() as keeper:
            os.kill(os.getpid(), signal.SIGINT)
            assert keeper.stop_requested
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_stop_signal_while_starting_interrupts_the_start(world: World) -> None:
    with pytest.raises(StopRequested), world.keeper() as keeper:
        keeper.start(replace(world.child("api"), ready=lambda: False))
        keeper.request_stop()
        keeper.wait_ready("api")


def test_a_child_that_ignores_its_stop_signal_is_killed_after_its_grace(world: World) -> None:
    with world.keeper() as keeper:
        stubborn = world.child(
            "api", "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf', flush=True)\ntime.sleep(600)"
        )
        keeper.start(replace(stubborn, grace_seconds=0.1))
        until(lambda: "deaf" in (world.root / "api.log").read_text())
    assert not any(runs(pid) for pid in world.pids("api"))


def test_children_are_out_of_reach_of_the_terminal(world: World) -> None:
    with world.keeper() as keeper:
        keeper.start(world.child("api"))
        keeper.wait_ready("api")
        assert os.getpgid(world.pids("api")[0]) != os.getpgid(0)
        assert os.getsid(world.pids("api")[0]) != os.getsid(0)


def test_what_a_killed_supervisor_left_is_stopped_in_order_by_the_next_start(world: World) -> None:
    program = f"""
import sys
sys.path[:0] = [{str(PACKAGE_ROOT)!r}, {str(Path(__file__).parent)!r}]
from pathlib import Path
from test_keeper import World
world = World(Path({str(world.root)!r}))
with world.keeper() as keeper:
    keeper.start(world.child("database", layer=0))
    keeper.start(world.child("api", layer=2))
    keeper.wait_ready("database", "api")
    print("ready", flush=True)
    keeper.watch()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as supervisor:
        assert supervisor.stdout is not None
        supervisor.stdout.readline()
        supervisor.kill()
    left = [*world.pids("database"), *world.pids("api")]
    assert all(runs(pid) for pid in left)

    assert sorted(stop_leftovers(world.records_path)) == ["api", "database"]

    assert world.ended() == ["api", "database"]
    assert not any(runs(pid) for pid in left)
    assert stop_leftovers(world.records_path) == []


def test_a_process_that_got_a_recycled_pid_is_never_touched(world: World) -> None:
    bystander = ChildProcess(world.child("bystander"), world.root / "bystander.log")
    bystander.start_and_wait()
    try:
        records = Records(world.records_path)
        records.add(bystander.child, world.pids("bystander")[0])
        stored = json.loads(world.records_path.read_text())
        stored["children"][0]["create_time"] -= 3600
        world.records_path.write_text(json.dumps(stored))

        assert stop_leftovers(world.records_path) == []
        assert bystander.pid is not None
    finally:
        bystander.stop()


def test_a_log_over_its_limit_is_cut_while_the_child_goes_on_writing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedded.child.LOG_LIMIT_BYTES", 4)
    log = world.root / "api.log"
    go = world.root / "go"
    body = (
        "print('first', flush=True)\n"
        f"while not os.path.exists({str(go)!r}): time.sleep(0.01)\n"
        "print('second', flush=True)\n"
        "time.sleep(600)"
    )
    process = ChildProcess(world.child("api", body), log)
    process.start_and_wait()
    try:
        until(lambda: log.read_text() == "first\n")
        process.rotate_if_large()
        go.touch()
        until(lambda: log.read_text() == "second\n")
        assert (world.root / "api.log.1").read_text() == "first\n"
    finally:
        process.stop()


def run_until(keeper: Keeper, condition: Callable[[], bool]) -> None:
    """Let the keeper watch until the condition holds."""

    def stop_when_it_holds() -> None:
        try:
            until(condition)
        finally:
            keeper.request_stop()

    observer = threading.Thread(target=stop_when_it_holds)
    observer.start()
    keeper.watch()
    observer.join()
    assert condition()
