"""Goal: the drills' short forms hold in every test run. The long ones are `make drills`; docs/drills.md.

Method: the drills themselves, on one platform of their own with fewer events; and the proof is shown to see damage.
"""

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from uuid import uuid4

import pytest

from domain import faults
from drills import contention, due, lost_temporal, points, redemptions, same_keys
from drills.audit import prove, settled
from drills.case import SHORT, Broken, Finding, Say
from drills.client import client_of
from drills.platform import Platform, fresh_platform
from drills.workload import REFUSED, Entry, Program, expected, make_events, make_program, offer


@pytest.fixture(scope="module")
async def platform() -> AsyncIterator[Platform]:
    async with fresh_platform() as platform:
        yield platform


def quietly(what: str) -> None:
    del what


# --- the drills, in short ---


async def test_an_api_killed_with_an_event_half_stored_loses_and_doubles_nothing(platform: Platform) -> None:
    found = await points.kill_at("ingest.stored", platform, SHORT, quietly)
    assert isinstance(found, Finding)


async def test_a_worker_killed_with_a_batch_half_done_loses_and_doubles_nothing(platform: Platform) -> None:
    await points.kill_at("batch.written", platform, SHORT, quietly)


async def test_same_keys_from_several_clients_at_once_are_one_event_each(platform: Platform) -> None:
    await same_keys.run(platform, SHORT, quietly)


async def test_events_and_direct_operations_on_the_same_holders_get_in_nobodys_way(platform: Platform) -> None:
    await contention.run(platform, SHORT, quietly)


async def test_events_that_wait_while_temporal_loses_everything_are_processed(platform: Platform) -> None:
    await lost_temporal.run(platform, SHORT, quietly)


async def test_a_worker_killed_with_holds_half_ended_ends_each_of_them_once(platform: Platform) -> None:
    await due.kill_at("hold_ends.written[PROGRAM]", platform, SHORT, quietly)


async def test_a_worker_killed_with_lots_half_booked_books_each_of_them_once(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the proof of it sees an end that is missing, of another amount or at another time."""
    prove_due = due.prove

    async def and_see_damage(
        platform: Platform, place: due.Place, promises: list[due.Promise], recovered: float, say: Say
    ) -> Finding:
        found = await prove_due(platform, place, promises, recovered, say)
        mature = next(promise for promise in promises if promise.kind == "mature")
        hold, *others = promises
        for claim in (
            others,
            [*promises, hold],
            [*promises, mature],
            [replace(hold, amount=hold.amount + 1), *others],
            [replace(hold, until=hold.until + timedelta(seconds=1)), *others],
            [replace(promise, kind="expire") if promise is mature else promise for promise in promises],
        ):
            with pytest.raises(Broken):
                await prove_due(platform, place, claim, recovered, say)
        return found

    monkeypatch.setattr(due, "prove", and_see_damage)

    await due.kill_at("due_lots.written[MATURITY]", platform, SHORT, quietly)


async def test_a_worker_killed_between_two_steps_leaves_no_value_reserved(platform: Platform) -> None:
    await redemptions.kill_at("redemption.committed", platform, SHORT, quietly)


async def test_redemptions_that_wait_while_temporal_loses_everything_end_as_they_should(platform: Platform) -> None:
    await redemptions.lose_temporal(platform, SHORT, quietly)


# --- the proof itself ---


async def test_the_proof_sees_an_event_that_is_missing_or_out_of_order_or_should_have_failed(
    platform: Platform,
) -> None:
    await platform.provide()
    async with client_of(platform) as client:
        program = await make_program(client, "proof")
        events = make_events(program, 60)
        await offer(client, program, events)
        await settled(platform, program.id)
        await prove(platform, program, events)

        more = replace(events[0], number=60)
        same = [event for event in events if event.who == events[0].who]
        swapped = [*reversed(same), *(event for event in events if event.who != events[0].who)]
        changed = replace(events[0], data={**events[0].data, "type": "purchase", "amount": 401})
        for claim in ([*events, more], events[1:], swapped, [changed, *events[1:]]):
            with pytest.raises(Broken):
                await prove(platform, program, claim)
        with pytest.raises(Broken):
            await prove(platform, program, events, refused={events[1].key: "never"})


def test_the_reference_follows_the_rules_in_order() -> None:
    program = Program(uuid4(), uuid4(), "1-")
    (event,) = make_events(program, 1)

    def sent(number: int, kind: str, amount: int) -> object:
        return replace(event, number=number, who="ann", data={"type": kind, "amount": amount, "to": "bob"})

    steps = [("purchase", 400), ("purchase", 600), ("purchase", 10), ("purchase", 10), ("refund", 5), ("purchase", 10)]
    steps += [("purchase", 900), ("gift", 7)]
    found = expected([sent(number, kind, amount) for number, (kind, amount) in enumerate(steps)])  # type: ignore[misc]

    assert found.outcomes["event-6"] == ("FAILED", REFUSED)
    assert [(entry.rule, entry.holder, entry.amount) for entry in found.entries["ann"]] == [
        ("earn", "ann", Decimal(500)),
        ("earn", "ann", Decimal(750)),
        ("earn", "ann", Decimal("12.5")),
        ("milestone", "ann", Decimal(50)),
        ("earn", "ann", Decimal("12.5")),
        ("refund", "ann", Decimal(-5)),
        ("earn", "ann", Decimal("12.5")),
        ("milestone", "ann", Decimal(50)),
        ("gift", "ann", Decimal(-7)),
        ("gift", "bob", Decimal(7)),
    ]
    assert found.entries["ann"][0] == Entry("event-0", "earn", "CREDIT", "ann", Decimal(500))
    assert found.states["ann"].is_gold
    assert found.states["ann"].spend == 1030


# --- fault points ---


async def test_a_fault_with_a_subject_strikes_only_there() -> None:
    with faults.arm("event.applying[ann]=fail"):
        await faults.reach("event.applying", "bob")
        with pytest.raises(faults.InjectedFault):
            await faults.reach("event.applying", "ann")
        await faults.reach("event.applying", "ann")


@pytest.mark.parametrize("text", ["nowhere=kill", "batch.written=explode", "event.applying[ann=kill", "batch.written"])
def test_a_fault_that_does_not_exist_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no such fault"):
        faults.parse(text)
