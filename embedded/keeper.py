"""Keeps a set of child processes running: starts, watches, restarts and stops them in order."""

import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from embedded.child import POLL_SECONDS, Child, ChildProcess
from embedded.problems import StartupProblem
from embedded.records import Records

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ONE_SHOT_TIMEOUT_SECONDS = 300
LOG_CHECK_SECONDS = 10


class StopRequested(Exception):
    """Somebody asked for the end (Ctrl-C, SIGTERM, SIGHUP) while something was being waited for."""


class RestartPolicy:
    """When a child that died may start again: backoff doubles from `first_delay_seconds`, within a budget.

    More than `limit` restarts in `window_seconds` mean that restarting does not help.
    """

    def __init__(self, *, first_delay_seconds: float = 0.5, limit: int = 5, window_seconds: float = 60) -> None:
        self._first_delay_seconds = first_delay_seconds
        self._limit = limit
        self._window_seconds = window_seconds
        self._deaths: deque[float] = deque(maxlen=limit + 1)

    def delay_after_death(self, now: float) -> float | None:
        """Record a death at `now` (seconds) and return the seconds to wait before the restart, or None to give up."""
        self._deaths.append(now)
        recent = sum(1 for death in self._deaths if now - death < self._window_seconds)
        if recent > self._limit:
            return None
        return float(self._first_delay_seconds * 2 ** (recent - 1))


class _Kept:
    """A child that is kept running, with its restart budget."""

    def __init__(self, process: ChildProcess, policy: RestartPolicy) -> None:
        self.process = process
        self.policy = policy
        self.restart_at: float | None = None


class Keeper:
    """Runs children until it is asked to stop; as a context manager it leaves nothing running, however it is left.

    While it is entered, SIGINT, SIGTERM and SIGHUP mean an orderly stop; a second one ends the children's grace.
    `say` gets one sentence per event. `policy` makes the restart policy of each child.
    """

    def __init__(
        self,
        log_of: Callable[[str], Path],
        records: Records,
        say: Callable[[str], None],
        policy: Callable[[], RestartPolicy] = RestartPolicy,
    ) -> None:
        self._log_of = log_of
        self._records = records
        self._say = say
        self._policy = policy
        self._kept: dict[str, _Kept] = {}
        self._signals_seen = 0
        self._handlers_before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                # Under nohup SIGHUP is ignored from the start, and stays so. SIGINT is ignored from the start too, in
                # whatever a script runs in the background, but there it still is our orderly stop.
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                    self._handlers_before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.stop_all()
        finally:
            for number, handler in self._handlers_before.items():
                signal.signal(number, handler)

    @property
    def stop_requested(self) -> bool:
        """Whether the end was asked for."""
        return self._signals_seen > 0

    def request_stop(self) -> None:
        """Ask for the end, as a signal does; asked twice, children are killed without further grace."""
        self._signals_seen += 1

    def start(self, child: Child) -> None:
        """Start a child and keep it; its readiness is `wait_ready`'s matter. Raises StartupProblem."""
        kept = _Kept(ChildProcess(child, self._log_of(child.name)), self._policy())
        self._kept[child.name] = kept
        self._run(kept.process)

    def wait_ready(self, *names: str) -> None:
        """Return once all the named children are ready.

        Raises StartupProblem when a kept child ends meanwhile or one takes longer than its start timeout, and
        StopRequested when the end is asked for.
        """
        started_at = time.monotonic()
        waiting = [self._kept[name].process for name in names]
        while waiting:
            self._check_start()
            waiting = [process for process in waiting if not process.child.ready()]
            for process in waiting:
                if time.monotonic() - started_at > process.child.start_timeout_seconds:
                    raise StartupProblem(f"{process.failure()}\nIt was not ready within its time.")
            if waiting:
                time.sleep(POLL_SECONDS)

    def run_once(self, name: str, argv: Sequence[str], env: Mapping[str, str]) -> str:
        """Run a command to its end and return its standard output, which appears in no log.

        Raises StartupProblem when it fails, takes longer than five minutes or a kept child ends meanwhile, and
        StopRequested when the end is asked for.
        """
        process = ChildProcess(Child(name, tuple(argv), env, ready=lambda: True, layer=2), self._log_of(name))
        deadline = time.monotonic() + ONE_SHOT_TIMEOUT_SECONDS
        with tempfile.TemporaryFile() as output:
            try:
                self._run(process, output)
                while process.pid is not None:
                    self._check_start()
                    if time.monotonic() > deadline:
                        raise StartupProblem(f"{process.failure()}\nIt did not end within its time.")
                    time.sleep(POLL_SECONDS)
            finally:
                process.stop()
            if process.returncode != 0:
                raise StartupProblem(process.failure())
            output.seek(0)
            return output.read().decode("utf-8")

    def watch(self) -> None:
        """Keep every child running until the end is asked for.

        Raises StartupProblem when a child died more often than its policy allows.
        """
        next_log_check = time.monotonic() + LOG_CHECK_SECONDS
        while not self.stop_requested:
            now = time.monotonic()
            for kept in self._kept.values():
                self._tend(kept, now)
            if now >= next_log_check:
                self._rotate_logs()
                next_log_check = now + LOG_CHECK_SECONDS
            time.sleep(POLL_SECONDS)

    def stop_all(self) -> None:
        """Stop every child, the highest layer first, and wait for their end."""
        processes = [kept.process for kept in self._kept.values()]
        for layer in sorted({process.child.layer for process in processes}, reverse=True):
            self._stop_layer([process for process in processes if process.child.layer == layer])
        self._kept.clear()
        self._records.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.request_stop()

    def _run(self, process: ChildProcess, output: Any = None) -> None:
        self._records.add(process.child, process.start(output))

    def _check_start(self) -> None:
        if self.stop_requested:
            raise StopRequested
        for kept in self._kept.values():
            if kept.process.pid is None:
                raise StartupProblem(kept.process.failure())

    def _tend(self, kept: _Kept, now: float) -> None:
        if kept.process.pid is not None:
            return
        if kept.restart_at is None:
            self._plan_restart(kept, now)
        elif now >= kept.restart_at:
            kept.restart_at = None
            self._run(kept.process)

    def _plan_restart(self, kept: _Kept, now: float) -> None:
        failure = kept.process.failure()
        delay_seconds = kept.policy.delay_after_death(now)
        if delay_seconds is None:
            raise StartupProblem(f"{failure}\n{kept.process.child.name} does not stay up. Stopping everything.")
        self._say(f"{failure}\nStarting {kept.process.child.name} again in {delay_seconds:g} s.")
        kept.restart_at = now + delay_seconds

    def _rotate_logs(self) -> None:
        for kept in self._kept.values():
            kept.process.rotate_if_large()

    def _stop_layer(self, processes: list[ChildProcess]) -> None:
        impatience = self._signals_seen
        for process in processes:
            process.ask_to_stop()
        stopping_since = time.monotonic()
        while alive := [process for process in processes if process.pid is not None]:
            waited = time.monotonic() - stopping_since
            for process in alive:
                if waited > process.child.grace_seconds or self._signals_seen > max(impatience, 1):
                    process.kill()
            time.sleep(POLL_SECONDS)
