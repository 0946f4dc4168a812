"""Goal: a newcomer's first look is right to the cent, can be repeated, and says what to do when something is missing.

Method: `scrip demo` against the running system, compared with a second implementation of the card (reference.py).
"""

import asyncio
import socket
import subprocess
import sys
from io import StringIO
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from demo import card_program
from demo.make_purchases import read_purchases
from demo.run import Connection, demo_command, run_demo
from tests.demo.reference import expect
from tests.system import ROOT, System


def test_every_cent_is_as_expected_and_a_second_run_adds_nothing(system: System) -> None:
    expected = expect(read_purchases())
    connection = Connection(system.api_url, system.api_key)

    first = asyncio.run(run_demo(connection, Console(file=StringIO())))
    assert first.failed == []
    assert first.rule_hits == dict(expected.hits)
    assert first.balances == dict(expected.cashback)
    assert first.verification["valid"] is True

    again = command("--data-dir", str(system.data_dir))
    assert again.returncode == 0, again.stderr
    assert "the same events sent again add nothing" in again.stdout
    assert "The ledger verifies" in again.stdout
    assert "Top 10 of 200 cardholders" in again.stdout
    assert system.api_key not in again.stdout + again.stderr

    (found,) = everything(system, "/programs", {"search": card_program.PROGRAM_NAME})
    program = {"program_id": str(found["id"])}
    assert len(everything(system, "/journal-entries", program)) == expected.entries
    assert len(everything(system, "/events", program)) == 5_000 + expected.hits["monthly reset"]
    assert len(everything(system, "/rules", program)) == 8


def test_without_a_running_system_it_says_how_to_start_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo_command(data_dir=tmp_path) == 1
    assert "make run" in capsys.readouterr().err
    assert demo_command(ready_file=tmp_path / "ready.json") == 1
    assert "ready.json does not exist" in capsys.readouterr().err


def test_an_address_where_nothing_answers_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert demo_command(api_url=f"http://127.0.0.1:{port}", api_key="sk_any") == 1
    said = capsys.readouterr().err
    assert f"Nothing answers at http://127.0.0.1:{port}" in said
    assert "Traceback" not in said
    assert demo_command(api_url="nonsense", api_key="sk_any") == 1
    assert "Nothing answers at nonsense" in capsys.readouterr().err


def test_a_wrong_key_is_told_from_a_wrong_address(
    system: System,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert demo_command(api_url=system.api_url, api_key="sk_wrong") == 1
    said = capsys.readouterr().err
    assert "does not know this API key" in said
    assert "scrip keys" in said


def everything(system: System, path: str, query: dict[str, str]) -> list[dict[str, object]]:
    """Every item of a list."""
    items: list[dict[str, object]] = []
    headers = {"Authorization": f"Bearer {system.api_key}"}
    with httpx.Client(base_url=f"{system.api_url}/v1", headers=headers, timeout=30) as client:
        parameters = {"limit": "200", **query}
        while True:
            answer = client.get(path, params=parameters).raise_for_status().json()
            items += answer["data"]
            if not answer["pagination"]["has_more"]:
                return items
            parameters["cursor"] = answer["pagination"]["next_cursor"]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cli", "demo", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
