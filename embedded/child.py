"""One child process: how it is started, known to be ready, and stopped."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from embedded.files import tail
from embedded.problems import StartupProblem

LOG_LIMIT_BYTES = 50 * 1024 * 1024
POLL_SECONDS = 0.05

# The directory that holds `cli.py`: children run there, so that `-m cli` can't meet a cli.py of somebody else.
PACKAGE_ROOT = Path(__file__).resolve().parents[1]


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Child:
    """What is needed to run one process and keep it running.

    `ready` is asked again and again and must answer within about two seconds. `layer` orders the stop: higher layers
    stop first, one layer at a time. `popen` goes to `subprocess.Popen` as it is.
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    ready: Callable[[], bool]
    layer: int = 0
    stop_signal: signal.Signals = signal.SIGTERM
    grace_seconds: float = 10
    start_timeout_seconds: float = 60
    before_start: Callable[[], None] = _nothing
    popen: Mapping[str, Any] = field(default_factory=dict)


class ChildProcess:
    """The running instance of a `Child`; its output goes to `log`, which is kept below `LOG_LIMIT_BYTES`."""

    def __init__(self, child: Child, log: Path) -> None:
        self.child = child
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The process id while it runs, else None."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def returncode(self) -> int | None:
        """The exit status of the last run (negative: the signal), None while it runs or before it ran."""
        return self._process.poll() if self._process is not None else None

    def start(self, stdout: IO[bytes] | None = None) -> int:
        """Start the process in a session of its own and return its pid; `stdout` takes its output out of the log.

        A session of its own means that Ctrl-C in the terminal reaches only the supervisor, which then stops its
        children in order. Raises StartupProblem when the program cannot be executed.
        """
        if self.pid is not None:
            raise RuntimeError(f"{self.child.name} is already running")
        self.child.before_start()
        self._rotate_at_start()
        options: dict[str, Any] = {"cwd": PACKAGE_ROOT, **self.child.popen}
        with self.log.open("ab") as output:
            try:
                self._process = subprocess.Popen(  # noqa: S603
                    self.child.argv,
                    env=dict(self.child.env),
                    stdin=subprocess.DEVNULL,
                    stdout=stdout or output,
                    stderr=output,
                    start_new_session=True,
                    **options,
                )
            except OSError as error:
                raise StartupProblem(f"{self.child.name} cannot be started: {error}") from error
        return self._process.pid

    def start_and_wait(self) -> None:
        """Start the process and return once it is ready. Raises StartupProblem, with nothing left running."""
        self.start()
        deadline = time.monotonic() + self.child.start_timeout_seconds
        try:
            while not self.child.ready():
                if self.pid is None:
                    raise StartupProblem(self.failure())
                if time.monotonic() > deadline:
                    raise StartupProblem(f"{self.failure()}\nIt was not ready within its time.")
                time.sleep(POLL_SECONDS)
        except BaseException:
            self.stop()
            raise

    def ask_to_stop(self) -> None:
        """Send the child's stop signal; does nothing when it has ended."""
        if self._process is not None:
            self._process.send_signal(self.child.stop_signal)

    def kill(self) -> None:
        """End the process and whatever it started, at once."""
        if self.pid is not None:
            os.killpg(self.pid, signal.SIGKILL)

    def stop(self) -> None:
        """Ask the process to stop, wait for the child's grace, then kill it; returns once it has ended."""
        if self._process is None:
            return
        self.ask_to_stop()
        try:
            self._process.wait(self.child.grace_seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()

    def failure(self) -> str:
        """Say how the last run ended, with the last lines of its log."""
        status = self.returncode
        how = "is running" if status is None else f"ended with status {status}"
        return f"{self.child.name} {how}; its log is {self.log}\n{tail(self.log)}".rstrip()

    def rotate_if_large(self) -> None:
        """Keep the log below its limit: the child holds the file open for appending, so it is copied and emptied."""
        if self.log.stat().st_size < LOG_LIMIT_BYTES:
            return
        shutil.copyfile(self.log, self._old_log)
        os.truncate(self.log, 0)

    @property
    def _old_log(self) -> Path:
        return self.log.with_name(f"{self.log.name}.1")

    def _rotate_at_start(self) -> None:
        # A restart appends: the lines that say why the child died must still be there.
        if self._process is None and self.log.exists():
            os.replace(self.log, self._old_log)
