"""Goal: an operator finds a program's work in Temporal with Temporal's own tools, and can read what it is.

Method: events sent to the running system, then the real `temporal` command line, as an operator would call it.
"""

import base64
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from domain.ids import new_id
from tests.system import System, running_system

__all__ = ["running_system"]

FOUND_WITHIN_S = 30


@pytest.fixture
def program_id(system: System) -> str:
    """A fresh program that has been sent three events."""
    headers = {"Authorization": f"Bearer {system.api_key}"}
    with httpx.Client(base_url=f"{system.api_url}/v1", headers=headers, timeout=30) as client:
        made = client.post("/programs", json={"name": "Coffee Club"}).raise_for_status().json()
        for n in range(3):
            event = {
                "program_id": made["id"],
                "external_id": f"guest-{new_id()}",
                "idempotency_key": f"visit-{n}",
                "event_timestamp": "2026-01-15T10:00:00Z",
                "event_data": {"type": "visit"},
            }
            client.post("/events", json=event).raise_for_status()
    return str(made["id"])


def test_the_workflow_of_a_program_is_listed_under_its_search_attribute(system: System, program_id: str) -> None:
    (found,) = listed(system, f"ScripProgram = '{program_id}'")

    assert found["type"]["name"] == "EventProcessing"
    assert found["execution"]["workflowId"] == f"events/{program_id}"


def test_its_description_names_the_program(system: System, program_id: str) -> None:
    listed(system, f"ScripProgram = '{program_id}'")

    described = temporal(system, "workflow", "describe", "--workflow-id", f"events/{program_id}")

    assert described["executionConfig"]["userMetadata"]["summary"] == "Events of Coffee Club"
    attributes = described["workflowExecutionInfo"]["searchAttributes"]["indexedFields"]
    assert value_of(attributes["ScripProgram"]) == program_id


def test_its_history_says_what_each_activity_is_for(system: System, program_id: str) -> None:
    listed(system, f"ScripProgram = '{program_id}'")
    deadline = time.monotonic() + FOUND_WITHIN_S
    summaries: list[Any] = []
    while not summaries:
        assert time.monotonic() < deadline, "no activity was scheduled"
        history = temporal(system, "workflow", "show", "--workflow-id", f"events/{program_id}")
        summaries = [
            event["userMetadata"]["summary"]
            for event in history["events"]
            if event["eventType"] == "EVENT_TYPE_ACTIVITY_TASK_SCHEDULED"
        ]

    assert value_of(history["events"][0]["userMetadata"]["summary"]) == "Events of Coffee Club"
    assert value_of(summaries[0]) == "drain the queue of Coffee Club"


def listed(system: System, query: str) -> list[dict[str, Any]]:
    """The workflows that Temporal's visibility finds; it may be a moment behind."""
    deadline = time.monotonic() + FOUND_WITHIN_S
    while True:
        found: list[dict[str, Any]] = temporal(system, "workflow", "list", "--query", query)
        if found or time.monotonic() > deadline:
            return found


def value_of(payload: dict[str, Any]) -> Any:
    """What a payload of Temporal holds; its JSON is shown as base64."""
    return json.loads(base64.b64decode(payload["data"]))


def temporal(system: System, *words: str) -> Any:
    """The answer of `temporal`, as installed beside this Python."""
    address = json.loads((system.directory / "ready.json").read_text())["temporal_address"]
    program = Path(sys.executable).parent / "temporal"
    done = subprocess.run(
        [program, *words, "--address", address, "-o", "json"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
