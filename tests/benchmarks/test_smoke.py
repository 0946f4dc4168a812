"""Goal: `python -m benchmarks` gives every headline figure and leaves nothing behind. Speed is never asserted.

Method: the real command with --quick, as a process of its own, whose temporary files lie in a directory of the test.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from benchmarks.load import ROOT

LIMIT_S = 300

HEADLINE = (
    "events_per_s_batch",
    "events_per_s_single",
    "accept_to_completed_p50_ms",
    "accept_to_completed_p99_ms",
    "entries_per_s_batch",
    "adjust_per_s",
    "adjust_p50_ms",
    "signals_per_1000_events",
    "rss_mb_api",
    "rss_mb_worker",
    "client_cpu_share",
    "events_per_temporal_operation",
    "workflow_per_event_per_s",
    "postgres_ceiling_rows_per_s",
    "events_over_workflow_baseline",
)


def start(scratch: Path, *arguments: str) -> "subprocess.Popen[str]":
    scratch.mkdir()
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "--quick", *arguments],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def left_behind(scratch: Path) -> list[str]:
    """Files below `scratch` and processes that were started for it."""
    files = [str(path) for path in scratch.rglob("*")]
    processes = [
        " ".join(process.info["cmdline"])
        for process in psutil.process_iter(["cmdline"])
        if any(str(scratch) in word for word in process.info["cmdline"] or ())
    ]
    return files + processes


def test_a_quick_run_gives_every_headline_figure_and_leaves_nothing_behind(tmp_path: Path) -> None:
    output, scratch = tmp_path / "figures.json", tmp_path / "scratch"
    process = start(scratch, "--output", str(output))
    printed, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, printed
    figures = json.loads(output.read_text())
    assert {name for name in HEADLINE if not figures.get(name, 0) > 0} == set(), printed
    assert all(name in printed for name in HEADLINE)
    assert figures["run"]["failed"] == figures["run"]["skipped"] == {}
    assert left_behind(scratch) == []


def test_a_run_that_is_stopped_half_way_stops_everything_it_started(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    process = start(scratch, "--output", str(tmp_path / "figures.json"))
    deadline = time.monotonic() + LIMIT_S
    while not list(scratch.glob("*/ready.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=LIMIT_S)
    assert process.returncode == 128 + signal.SIGTERM
    assert left_behind(scratch) == []
