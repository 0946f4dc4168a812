"""Verification finds what was tampered with, and names it. Contract: holders.md 8.4, 9.15; endpoints.md "integrity"."""

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest

from db.session import Database
from domain import limits
from domain.balances import Holder
from domain.ledger import moments
from domain.ledger.canonical import GENESIS_HASH
from domain.ledger.journal import load_accounts, write
from domain.ledger.verify import (
    _ACCOUNTS,
    _HOLDS,
    _LOTS,
    Integrity,
    Walk,
    advance,
    begin_walk,
    check_window,
    resume,
    save,
    verify_chain,
)
from domain.locks import lock_participants
from tests.builders import Shop, d, make_participant, open_shop
from tests.conftest import SettableClock, Tenant
from tests.holdings_support import Desk
from tests.servers import Postgres

ENTRIES = 10
Tamper = Callable[..., None]


@pytest.fixture
def tamper(postgres: Postgres) -> Iterator[Tamper]:
    """Run one statement as a superuser for whom no guard exists."""
    with psycopg.connect(postgres.superuser_url, autocommit=True) as connection:
        connection.execute("set session_replication_role = replica")

        def run(statement: Any, *params: Any) -> None:
            changed = connection.execute(statement, params).rowcount
            assert changed > 0, "the statement found nothing to tamper with"

        yield run


@pytest.fixture
async def shop(database: Database, organization: Tenant) -> Shop:
    return await open_shop(database, organization.id)


@pytest.fixture
async def entries(database: Database, organization: Tenant, shop: Shop) -> list[UUID]:
    """Ten credits of 1 to 10 to alice, in two transactions; their entries' ids in the chain's order."""
    return [
        *await credits(database, organization, shop, 1, 2, 3),
        *await credits(database, organization, shop, *range(4, 11)),
    ]


async def credits(database: Database, organization: Tenant, shop: Shop, *amounts: int) -> list[UUID]:
    async with database.transaction(organization.id, api_key_id=organization.api_key_id) as tx:
        await lock_participants(tx, [shop.alice])
        books = await load_accounts(tx, [shop.alice], [shop.asset_id])
        alice = books.account("PARTICIPANT", shop.alice, shop.asset_id, "AVAILABLE")
        source = books.system("SYSTEM_ISSUANCE", shop.asset_id)
        for amount in amounts:
            movements = [(source, d(f"-{amount}")), (alice, d(str(amount)))]
            books.post("CREDIT", movements, program_id=shop.program_id, description="welcome")
        await write(tx, books)
    return [entry.id for entry in books.entries]


async def verify(database: Database, organization: Tenant) -> Walk:
    async with database.transaction(organization.id) as tx:
        walk = await verify_chain(tx)
    assert walk is not None
    return walk


async def check(database: Database, organization: Tenant, window: int = 1_000) -> Integrity:
    async with database.transaction(organization.id) as tx:
        return await check_window(tx, window)


async def check_at(database: Database, organization: Tenant, instant: datetime, window: int = 1_000) -> Integrity:
    async with database.transaction(organization.id) as tx:
        return await check_window(tx, window, await moments.at(tx, instant))


async def assert_found(database: Database, organization: Tenant, entry_id: UUID) -> None:
    walk, integrity = await verify(database, organization), await check(database, organization)
    assert (walk.valid, walk.first_invalid_entry_id) == (False, entry_id)
    assert (integrity.valid, integrity.first_invalid_entry_id) == (False, entry_id)


async def test_an_empty_ledger_is_valid(database: Database, organization: Tenant) -> None:
    walk, integrity = await verify(database, organization), await check(database, organization)

    assert (walk.valid, walk.entries_checked, walk.head_sequence) == (True, 0, 0)
    assert (integrity.valid, integrity.entries_checked, integrity.head_sequence) == (True, 0, 0)
    assert integrity.head_hash == GENESIS_HASH
    assert integrity.checked_from_sequence is None
    assert integrity.checked_to_sequence is None


async def test_an_untouched_ledger_is_valid(database: Database, organization: Tenant, entries: list[UUID]) -> None:
    walk, integrity = await verify(database, organization), await check(database, organization)

    assert (walk.valid, walk.entries_checked, walk.problem) == (True, ENTRIES, None)
    assert (integrity.valid, integrity.entries_checked) == (True, ENTRIES)
    assert (integrity.checked_from_sequence, integrity.checked_to_sequence, integrity.head_sequence) == (1, 10, 10)
    assert integrity.first_invalid_entry_id is None


async def test_a_window_checks_the_newest_entries_only(
    database: Database, organization: Tenant, entries: list[UUID], tamper: Tamper
) -> None:
    tamper("update journal_entry set description = 'x' where id = %s", entries[6])

    within = await check(database, organization, window=4)
    beyond = await check(database, organization, window=3)

    assert (within.first_invalid_entry_id, within.checked_from_sequence) == (entries[6], 7)
    assert (beyond.valid, beyond.checked_from_sequence, beyond.entries_checked) == (True, 8, 3)


async def test_a_window_is_tied_to_the_entry_before_it(
    database: Database, organization: Tenant, entries: list[UUID], tamper: Tamper
) -> None:
    tamper("update journal_entry set entry_hash = sha256('') where id = %s", entries[6])

    assert (await check(database, organization, window=3)).first_invalid_entry_id == entries[7]
    assert (await check(database, organization, window=4)).first_invalid_entry_id == entries[6]


@pytest.mark.parametrize(
    "statement",
    [
        "update posting set amount = amount * 2 where entry_id = %s and ordinal = 1",
        "update posting set amount = amount * 2 where entry_id = %s",
        "update posting set amount = 'NaN' where entry_id = %s",
        "update posting set amount = 'Infinity' where entry_id = %s",
        "update posting set amount = amount * 10::numeric ^ 90 + 1 where entry_id = %s",
        "update posting set id = gen_random_uuid() where entry_id = %s and ordinal = 0",
        "update posting set ordinal = 1 - ordinal + 5 where entry_id = %s",
        "update posting set account_id = gen_random_uuid() where entry_id = %s and ordinal = 0",
        "update posting set asset_id = gen_random_uuid() where entry_id = %s",
        "delete from posting where entry_id = %s and ordinal = 1",
        "delete from posting where entry_id = %s",
        "update journal_entry set description = 'goodbye' where id = %s",
        "update journal_entry set description = null where id = %s",
        "update journal_entry set action_type = 'FUND' where id = %s",
        "update journal_entry set program_id = gen_random_uuid() where id = %s",
        "update journal_entry set event_id = gen_random_uuid() where id = %s",
        "update journal_entry set rule_id = gen_random_uuid() where id = %s",
        "update journal_entry set api_key_id = null where id = %s",
        "update journal_entry set reference_id = 'r' where id = %s",
        "update journal_entry set created_at = created_at + interval '1 microsecond' where id = %s",
        "update journal_entry set prev_hash = sha256('') where id = %s",
        "update journal_entry set entry_hash = sha256('') where id = %s",
        "update journal_entry set hash_version = 2 where id = %s",
    ],
)
async def test_whatever_changes_in_an_entry_names_that_entry(
    database: Database, organization: Tenant, entries: list[UUID], tamper: Tamper, statement: str
) -> None:
    tamper(statement, entries[4])

    await assert_found(database, organization, entries[4])


async def test_a_posting_moved_to_another_holder_is_found(
    database: Database, organization: Tenant, entries: list[UUID], shop: Shop, tamper: Tamper
) -> None:
    tamper("update account set entity_id = gen_random_uuid() where entity_id = %s", shop.alice)

    await assert_found(database, organization, entries[0])


async def test_the_entry_behind_a_hole_is_the_invalid_one(
    database: Database, organization: Tenant, entries: list[UUID], tamper: Tamper
) -> None:
    tamper("delete from posting where entry_id = %s", entries[4])
    tamper("delete from journal_entry where id = %s", entries[4])

    await assert_found(database, organization, entries[5])
    assert (await check(database, organization, window=5)).first_invalid_entry_id == entries[5]


async def test_the_first_entry_is_tied_to_genesis(
    database: Database, organization: Tenant, entries: list[UUID], tamper: Tamper
) -> None:
    tamper("delete from posting where entry_id = %s", entries[0])
    tamper("delete from journal_entry where id = %s", entries[0])

    await assert_found(database, organization, entries[1])


async def test_missing_newest_entries_are_found_by_the_head(
    database: Database, organization: Tenant, entries: list[UUID], tamper: Tamper
) -> None:
    tamper("delete from posting where entry_id = any(%s)", entries[8:])
    tamper("delete from journal_entry where id = any(%s)", entries[8:])

    walk, integrity = await verify(database, organization), await check(database, organization)

    assert (walk.valid, walk.first_invalid_entry_id) == (False, None)
    assert (integrity.valid, integrity.first_invalid_entry_id) == (False, None)
    assert (integrity.checked_to_sequence, integrity.head_sequence) == (8, 10)


async def test_an_emptied_journal_is_found_by_the_head(
    database: Database, organization: Tenant, entries: list[UUID], tamper: Tamper
) -> None:
    tamper("delete from posting where entry_id = any(%s)", entries)
    tamper("delete from journal_entry where id = any(%s)", entries)

    walk, integrity = await verify(database, organization), await check(database, organization)

    assert (walk.valid, walk.entries_checked) == (False, 0)
    assert (integrity.valid, integrity.entries_checked, integrity.checked_to_sequence) == (False, 0, None)


@pytest.mark.parametrize(
    "statement",
    [
        "update chain_head set sequence = sequence - 1 where organization_id = %s",
        "update chain_head set hash = sha256('') where organization_id = %s",
        "delete from chain_head where organization_id = %s",
    ],
)
async def test_a_changed_head_is_found(
    database: Database, organization: Tenant, entries: list[UUID], tamper: Tamper, statement: str
) -> None:
    tamper(statement, organization.id)

    walk, integrity = await verify(database, organization), await check(database, organization)

    assert (walk.valid, walk.first_invalid_entry_id) == (False, None)
    assert (integrity.valid, integrity.first_invalid_entry_id) == (False, None)


@pytest.mark.parametrize(
    "statement",
    [
        "update posting set balance = balance + 1 where entry_id = %s and version is not null",
        "update posting set version = version + 100 where entry_id = %s and version is not null",
        "update posting set version = null, balance = null where entry_id = %s and version is not null",
        "update posting set version = 1, balance = -5 where entry_id = %s and version is null",
    ],
)
async def test_a_changed_running_balance_is_found(
    database: Database, organization: Tenant, entries: list[UUID], tamper: Tamper, statement: str
) -> None:
    tamper(statement, entries[4])

    await assert_found(database, organization, entries[4])


async def test_a_windows_first_posting_is_tied_to_the_one_before_the_window(
    database: Database, organization: Tenant, entries: list[UUID], tamper: Tamper
) -> None:
    tamper("update posting set balance = balance + 1 where entry_id = %s and version is not null", entries[6])

    assert (await check(database, organization, window=3)).first_invalid_entry_id == entries[7]


async def test_a_window_of_a_moment_ends_at_its_newest_entry(
    database: Database, organization: Tenant, shop: Shop, clock: SettableClock, tamper: Tamper
) -> None:
    early = await credits(database, organization, shop, 1, 2, 3)
    noon = clock()
    clock.advance(hours=1)
    late = await credits(database, organization, shop, 4, 5)

    then = await check_at(database, organization, noon, window=2)
    assert (then.valid, then.checked_from_sequence, then.checked_to_sequence, then.head_sequence) == (True, 2, 3, 5)
    now = await check_at(database, organization, clock())
    assert (now.valid, now.checked_to_sequence) == (True, 5)
    before = await check_at(database, organization, noon - timedelta(days=1))
    assert (before.valid, before.entries_checked, before.checked_to_sequence) == (True, 0, None)

    tamper("update journal_entry set description = 'x' where id = %s", late[0])
    assert (await check_at(database, organization, noon)).valid
    # What the entry behind the window says of the window's last entry must hold too.
    tamper("update journal_entry set prev_hash = sha256('') where id = %s", late[0])
    assert not (await check_at(database, organization, noon)).valid
    tamper("update posting set amount = amount * 2 where entry_id = %s", early[1])
    assert (await check_at(database, organization, noon)).first_invalid_entry_id == early[1]


async def test_postings_that_no_entry_seals_are_found(
    database: Database, organization: Tenant, entries: list[UUID]
) -> None:
    async with database.transaction(organization.id) as tx:
        await tx.execute(
            "insert into posting (organization_id, entry_id, ordinal, id, account_id, asset_id, amount, version,"
            " balance) select p.organization_id, md5(%s::text)::uuid, m.ordinal, gen_random_uuid(), p.account_id,"
            " p.asset_id, m.amount, p.version + m.ordinal, p.balance + m.balance from posting p,"
            " (values (1, 5, 5), (2, -5, 0)) m (ordinal, amount, balance)"
            " where p.entry_id = %s and p.version is not null",
            (entries[-1], entries[-1]),
        )

    walk = await verify(database, organization)

    assert not walk.valid
    assert walk.problem is not None
    assert "doesn't exist" in walk.problem


async def test_entries_written_during_a_walk_do_not_disturb_it(
    database: Database, organization: Tenant, entries: list[UUID], shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "VERIFY_PAGE", 3)
    async with database.transaction(organization.id) as tx:
        walk = await begin_walk(tx)
    for amount in range(20):
        async with database.transaction(organization.id) as tx:
            if not await advance(tx, walk):
                break
        await credits(database, organization, shop, amount + 1)

    assert (walk.finished, walk.valid, walk.entries_checked) == (True, True, ENTRIES)


async def test_pages_are_tied_to_each_other(
    database: Database, organization: Tenant, entries: list[UUID], tamper: Tamper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "VERIFY_PAGE", 4)
    tamper("update posting set amount = amount * 2 where entry_id = %s", entries[4])

    assert (await verify(database, organization)).first_invalid_entry_id == entries[4]


async def test_a_long_chain_is_not_checked_within_a_request(
    database: Database, organization: Tenant, entries: list[UUID], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "VERIFY_IN_REQUEST", ENTRIES - 1)

    async with database.transaction(organization.id) as tx:
        assert await verify_chain(tx) is None


async def test_a_walk_goes_on_where_it_was_saved(
    database: Database, organization: Tenant, entries: list[UUID], tamper: Tamper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "VERIFY_PAGE", 3)
    tamper("update journal_entry set description = 'x' where id = %s", entries[7])
    async with database.transaction(organization.id) as tx:
        walk = await begin_walk(tx)
    pages = 0
    while not walk.finished:
        pages += 1
        walk = resume(json.loads(json.dumps(save(walk))))
        async with database.transaction(organization.id) as tx:
            await advance(tx, walk)

    assert pages == 3
    assert (walk.valid, walk.first_invalid_entry_id, walk.entries_checked) == (False, entries[7], 8)


async def test_a_saved_walk_from_before_an_upgrade_still_resumes(database: Database, organization: Tenant) -> None:
    """What a later version adds to a walk has a default."""
    saved = {"organization_id": str(organization.id), "head_sequence": 3, "head_hash": "ff" * 32, "sequence": 2}

    walk = resume(saved)

    assert (walk.sequence, walk.head_hash, walk.hash, walk.finished) == (2, b"\xff" * 32, GENESIS_HASH, False)


# --- Lots and holds: what is projected from the ledger ---------------------------------------------------------------


@pytest.fixture
async def desks(database: Database, organization: Tenant, clock: SettableClock) -> dict[str, Desk]:
    """Alice's desks, one with a LOT and one with a SIMPLE asset: 30 credited in two parts, 12 of it held, 5 debited.

    With lots, 7 more are DEFERRED.
    """
    shops = {mode: await open_shop(database, organization.id, inventory_mode=mode) for mode in ("LOT", "SIMPLE")}
    desks = {mode: Desk.of(database, organization.id, shop) for mode, shop in shops.items()}
    for desk in desks.values():
        await desk.credit("10")
        await desk.credit("20")
        await desk.hold("12")
        await desk.debit("5")
    await desks["LOT"].grant("7", matures_at=clock() + timedelta(days=1))
    return desks


@pytest.mark.parametrize(
    ("mode", "statement", "bucket"),
    [
        ("LOT", "update lot set remaining = remaining - 1 where status = 'AVAILABLE'", "AVAILABLE"),
        ("LOT", "update lot set remaining = remaining - 1 where status = 'HELD'", "HELD"),
        ("LOT", "update lot set remaining = remaining - 1 where status = 'DEFERRED'", "DEFERRED"),
        ("LOT", "update lot set status = 'AVAILABLE' where status = 'HELD'", "AVAILABLE|HELD"),
        ("LOT", "update lot set status = 'AVAILABLE' where status = 'DEFERRED'", "AVAILABLE|DEFERRED"),
        ("LOT", "update lot set status = 'CONSUMED' where status = 'DEFERRED'", "DEFERRED"),
        ("LOT", "update lot set amount = amount + 1 where status = 'DEFERRED'", "DEFERRED"),
        ("LOT", "update lot set entity_id = gen_random_uuid() where status = 'DEFERRED'", "DEFERRED"),
        ("LOT", "delete from lot where status = 'AVAILABLE'", "AVAILABLE"),
        ("LOT", "update lot_change set delta = delta - 1", ".*"),
        ("LOT", "update hold set remaining = remaining - 1", "HELD"),
        ("SIMPLE", "update hold set remaining = remaining - 1", "HELD"),
        ("SIMPLE", "update hold set status = 'RELEASED', remaining = 0", "HELD"),
        ("SIMPLE", "update hold set amount = amount + 1", "HELD"),
        ("SIMPLE", "delete from hold", "HELD"),
    ],
)
async def test_a_tampered_lot_or_hold_is_found(
    database: Database, organization: Tenant, desks: dict[str, Desk], tamper: Tamper, mode: str, statement: str,
    bucket: str,
) -> None:  # fmt: skip
    desk = desks[mode]
    of_asset = "(select id from lot where asset_id = %s)" if "lot_change" in statement else None
    condition = f"lot_id in {of_asset}" if of_asset else "asset_id = %s"
    tamper(f"{statement} {'and' if 'where' in statement else 'where'} {condition}", desk.asset_id)

    walk = await verify(database, organization)

    assert (walk.valid, walk.first_invalid_entry_id) == (False, None)
    assert re.search(f"holder [0-9a-f-]+, asset {desk.asset_id}, ({bucket}):", walk.problem or ""), walk.problem


@pytest.fixture
async def lots(database: Database, organization: Tenant, clock: SettableClock) -> Desk:
    """Alice's desk of a LOT asset with twins: whatever two of them exchange, the sums stay as they are.

    Lots of 10: one spent, one HELD, one HELD and released, two AVAILABLE that nothing has changed, one expired, two
    DEFERRED. Holds: ACTIVE ones of 10, of 3 and of 4; RELEASED ones of 10 and 1, and a FORFEITED one of 1.
    """
    desk = Desk.of(database, organization.id, await open_shop(database, organization.id, inventory_mode="LOT"))
    await desk.credit("10")
    await desk.debit("10")
    for _ in range(4):
        await desk.credit("10")
    _, held, released, *_ = [lot["id"] for lot in await desk.lot_rows()]
    await desk.hold(lot_ids=[held])
    await desk.hold(lot_ids=[released])
    await desk.release(lot_ids=[released])
    await desk.grant("10", expires_at=clock() + timedelta(minutes=1))
    for _ in range(2):
        await desk.grant("10", matures_at=clock() + timedelta(days=1))
    clock.advance(minutes=2)
    await desk.expire_due()
    await desk.credit("9")
    part = [(await desk.lot_rows())[-1]["id"]]
    for amount in ("3", "4", "1", "1"):
        await desk.hold(amount, lot_ids=part)
    *_, first, second = await desk.hold_rows()
    await desk.end(first["id"], "RELEASE")
    await desk.end(second["id"], "FORFEIT")
    walk = await verify(database, organization)
    assert (walk.problem, walk.stage) == (None, "DONE")
    return desk


# A lot is named by how its changes left it, the first of those by age.
_EXCHANGE = """
with pair as (
    select a.id as a, b.id as b, a.status as status_a, b.status as status_b, a.hold_id as hold_a, b.hold_id as hold_b
    from (select l.* from lot l where asset_id = %s and amount = 10 and {a} order by created_at, id limit 1) a,
         (select l.* from lot l where asset_id = %s and amount = 10 and {b} order by created_at desc, id desc limit 1) b
)
update lot set status = case lot.id when a then status_b else status_a end,
               hold_id = case lot.id when a then hold_b else hold_a end
from pair where lot.id in (a, b)
"""
_UNTOUCHED = "not exists (select from lot_change c where c.lot_id = l.id)"
_TOUCHED = "exists (select from lot_change c where c.lot_id = l.id)"


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("status = 'HELD'", f"status = 'AVAILABLE' and {_UNTOUCHED}"),
        ("status = 'HELD'", f"status = 'AVAILABLE' and {_TOUCHED}"),
        (f"status = 'AVAILABLE' and {_TOUCHED}", "status = 'DEFERRED'"),
        (f"status = 'AVAILABLE' and {_UNTOUCHED}", "status = 'DEFERRED'"),
        ("status = 'CONSUMED'", "status = 'EXPIRED'"),
    ],
    ids=["held and never held", "held and held before", "deferred and changed", "never changed", "spent and expired"],
)
async def test_lots_that_have_exchanged_their_statuses_are_found(
    database: Database, organization: Tenant, lots: Desk, tamper: Tamper, a: str, b: str
) -> None:
    """The sums don't show it: what the last change of each says does, or how it was made where nothing changed it."""
    before = {lot["id"]: lot for lot in await lots.lot_rows()}
    tamper(_EXCHANGE.format(a=a, b=b), lots.asset_id, lots.asset_id)
    exchanged = {lot["id"]: lot for lot in await lots.lot_rows() if lot["status"] != before[lot["id"]]["status"]}
    assert len(exchanged) == 2

    walk = await verify(database, organization)

    named = UUID(re.findall(r"lot ([0-9a-f-]+) is", walk.problem or "")[0])
    assert named in exchanged, walk.problem
    assert f"entry {await last_entry_of(lots, 'lot', named)} left it otherwise" in (walk.problem or "")


@pytest.mark.parametrize(
    ("table", "statement"),
    [
        ("lot", "update lot_change set status = 'AVAILABLE' where status = 'HELD' and lot_id = %s"),
        ("lot", "update lot_change set status = 'HELD' where status = 'AVAILABLE' and lot_id = %s"),
        ("lot", "update lot_change set status = 'EXPIRED' where status = 'CONSUMED' and lot_id = %s"),
        ("lot", "update lot set status = 'EXPIRED' where status = 'CONSUMED' and id = %s"),
        ("lot", "update lot set status = 'CONSUMED' where status = 'EXPIRED' and id = %s"),
        ("hold", "update hold set status = 'FORFEITED' where status = 'RELEASED' and id = %s"),
        ("hold", "update hold set status = 'EXPIRED' where status = 'FORFEITED' and id = %s"),
        ("hold", "update hold_change set status = 'VOIDED' where status = 'RELEASED' and hold_id = %s"),
    ],
)
async def test_a_status_that_its_last_change_does_not_explain_is_found(
    database: Database, organization: Tenant, lots: Desk, tamper: Tamper, table: str, statement: str
) -> None:
    """Whichever of the two was tampered with: the lot or hold is named, and the entry that changed it last."""
    tampered = await first_that(lots, table, statement)
    tamper(statement, tampered)

    walk = await verify(database, organization)

    assert (walk.valid, walk.first_invalid_entry_id) == (False, None)
    assert f"{table} {tampered} is " in (walk.problem or ""), walk.problem
    assert f"entry {await last_entry_of(lots, table, tampered)} left it otherwise" in (walk.problem or "")


async def test_an_earlier_change_does_not_explain_a_status(
    database: Database, organization: Tenant, lots: Desk, tamper: Tamper
) -> None:
    """Of a lot that was held and released: changes are in the order of their entries in the chain, not of their ids."""
    (lot_id,) = {row["lot_id"] for row in await changes(lots, "lot") if row["status"] == "HELD"} & {
        row["lot_id"] for row in await changes(lots, "lot") if row["status"] == "AVAILABLE" and row["delta"] == 0
    }
    first, last = [row["entry_id"] for row in await changes(lots, "lot") if row["lot_id"] == lot_id]
    for a, b in ((first, None), (last, first), (None, last)):
        # The entries' ids change places in the changes, so that the release comes first.
        tamper("update lot_change set entry_id = coalesce(%s, %s) where lot_id = %s and entry_id = coalesce(%s, %s)",
               b, UUID(int=1), lot_id, a, UUID(int=1))  # fmt: skip

    walk = await verify(database, organization)

    assert f"lot {lot_id} is AVAILABLE, and entry {last} left it otherwise" in (walk.problem or ""), walk.problem


async def test_lots_that_lie_in_another_hold_are_found(
    database: Database, organization: Tenant, lots: Desk, tamper: Tamper
) -> None:
    """All holds together still have what their holder's lots have."""
    held = {hold["remaining"]: hold["id"] for hold in await lots.hold_rows() if hold["status"] == "ACTIVE"}
    three, four = held[d("3")], held[d("4")]
    tamper(
        "update lot set hold_id = case hold_id when %s then %s::uuid else %s end where status = 'HELD'"
        " and hold_id = any(%s)",
        three, four, three, [three, four],
    )  # fmt: skip

    walk = await verify(database, organization)

    first, wrong = sorted([(three, ("3", "4")), (four, ("4", "3"))])[0]
    assert f"hold {first} has {wrong[0]}, and the lots in it have {wrong[1]}" in (walk.problem or ""), walk.problem


async def test_a_lot_in_the_hold_of_another_holder_is_found(
    database: Database, organization: Tenant, lots: Desk, tamper: Tamper
) -> None:
    async with database.transaction(organization.id) as tx:
        bob = lots.using(holder=Holder("PARTICIPANT", await make_participant(tx)))
    await bob.credit("10")
    await bob.hold("10")
    (theirs,) = await bob.hold_rows()
    mine = next(hold for hold in await lots.hold_rows() if hold["status"] == "ACTIVE" and hold["amount"] == 10)
    tamper(
        "update lot set hold_id = case hold_id when %s then %s::uuid else %s end where hold_id = any(%s)"
        " and status = 'HELD'",
        mine["id"], theirs["id"], mine["id"], [mine["id"], theirs["id"]],
    )  # fmt: skip

    walk = await verify(database, organization)

    assert re.search(r"hold [0-9a-f-]+ has 10, and the lots in it have 0$", walk.problem or ""), walk.problem


async def changes(desk: Desk, table: str) -> list[dict[str, Any]]:
    """The changes of the desk's lots or holds, in the order of their entries."""
    query: Any = (
        f"select c.* from {table}_change c join {table} r on r.id = c.{table}_id"
        " join journal_entry e on e.id = c.entry_id where r.asset_id = %s order by e.sequence"
    )
    async with desk.database.transaction(desk.organization_id) as tx:
        return await tx.rows(query, (desk.asset_id,))


async def last_entry_of(desk: Desk, table: str, row_id: UUID) -> UUID:
    """The entry that changed this lot or hold last, or made it where none did."""
    found = [row["entry_id"] for row in await changes(desk, table) if row[f"{table}_id"] == row_id]
    rows = await (desk.lot_rows() if table == "lot" else desk.hold_rows())
    entry_id: UUID = found[-1] if found else next(row["entry_id"] for row in rows if row["id"] == row_id)
    return entry_id


async def first_that(desk: Desk, table: str, statement: str) -> UUID:
    """The first lot or hold to which the statement does something to tamper with."""
    status = re.findall(r"where status = '(\w+)'", statement)[0]
    if "_change" in statement:
        latest = {row[f"{table}_id"]: row["status"] for row in await changes(desk, table)}
        found: UUID = next(row_id for row_id, last in latest.items() if last == status)
        return found
    rows = await (desk.lot_rows() if table == "lot" else desk.hold_rows())
    row_id: UUID = next(row["id"] for row in rows if row["status"] == status)
    return row_id


@pytest.mark.parametrize("page", [1, 2, 1_000])
async def test_sound_lots_and_holds_are_valid_whatever_the_page(
    database: Database, organization: Tenant, desks: dict[str, Desk], monkeypatch: pytest.MonkeyPatch, page: int
) -> None:
    await desks["LOT"].debit("100", allow_negative=True)
    monkeypatch.setattr(limits, "VERIFY_PAGE", page)

    walk = await verify(database, organization)

    assert (walk.valid, walk.stage, walk.problem) == (True, "DONE", None)


async def test_lots_beside_an_overdrawn_balance_are_found(
    database: Database, organization: Tenant, desks: dict[str, Desk], tamper: Tamper
) -> None:
    await desks["LOT"].debit("100", allow_negative=True)
    tamper(
        "update lot set status = 'AVAILABLE', remaining = 1 where id = (select id from lot where status = 'CONSUMED'"
        " and asset_id = %s limit 1)",
        desks["LOT"].asset_id,
    )

    assert "AVAILABLE: the balance is -87" in ((await verify(database, organization)).problem or "")


async def test_a_walk_through_lots_and_holds_goes_on_where_it_was_saved(
    database: Database, organization: Tenant, desks: dict[str, Desk], tamper: Tamper, monkeypatch: pytest.MonkeyPatch
) -> None:
    tamper("update hold set amount = amount + 1 where asset_id = %s", desks["SIMPLE"].asset_id)
    monkeypatch.setattr(limits, "VERIFY_PAGE", 1)
    async with database.transaction(organization.id) as tx:
        walk = await begin_walk(tx)
    stages = set()
    while not walk.finished:
        walk = resume(json.loads(json.dumps(save(walk))))
        async with database.transaction(organization.id) as tx:
            await advance(tx, walk)
        stages.add(walk.stage)

    assert stages >= {"POSTINGS", "ACCOUNTS", "LOTS", "HOLDS"}
    assert "hold" in (walk.problem or "")


async def test_a_busy_ledger_is_valid(
    database: Database, organization: Tenant, desks: dict[str, Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accounts, lots and holds change under the walk, and it never sees them between two commits."""
    monkeypatch.setattr(limits, "VERIFY_PAGE", 3)

    async def trade(desk: Desk) -> None:
        for _ in range(8):
            await desk.credit("3")
            await desk.hold("4")
            await desk.release("2")
            await desk.debit("1")

    writers = [asyncio.create_task(trade(desk)) for desk in desks.values()]
    walks = [await verify(database, organization)]
    while not all(writer.done() for writer in writers):
        walks.append(await verify(database, organization))
    await asyncio.gather(*writers)

    assert [walk.problem for walk in walks] == [None] * len(walks)


async def test_lots_and_holds_are_checked_through_indexes(
    database: Database, organization: Tenant, desks: dict[str, Desk], tamper: Tamper, owner: psycopg.Connection[Any]
) -> None:
    """As the application's role: row-level security turns index conditions into filters where one isn't careful."""
    asset_id = desks["LOT"].asset_id
    tamper(
        "insert into account select organization_id, gen_random_uuid(), entity_type, gen_random_uuid(), asset_id,"
        " bucket from account, generate_series(1, 2000) where asset_id = %s and entity_type = 'PARTICIPANT'",
        asset_id,
    )
    for table in ("lot", "hold"):
        tamper(
            f"insert into {table} select (jsonb_populate_record(r, jsonb_build_object('id', gen_random_uuid(),"
            f" 'entity_id', a.entity_id))).*"
            f" from account a, (select r from {table} r where asset_id = %s limit 1) of_alice"
            " where a.asset_id = (r).asset_id and a.entity_type = 'PARTICIPANT'",
            asset_id,
        )
        tamper(
            f"insert into {table}_change (organization_id, entry_id, {table}_id, delta, status"
            f"{', ordinal' if table == 'lot' else ''}) select organization_id, gen_random_uuid(), id, -1, status"
            f"{', 0' if table == 'lot' else ''} from {table} where asset_id = %s",
            asset_id,
        )
    owner.execute("analyze account, lot, hold, lot_change, hold_change")

    async with database.transaction(organization.id) as tx:
        params = {"organization_id": tx.organization_id, "after": UUID(int=0), "rows": 50}
        for query in (_ACCOUNTS, _LOTS, _HOLDS):
            explained: Any = f"explain (costs off) {query}"
            plan = [line for (line,) in await (await tx.execute(explained, params)).fetchall()]
            tables = "(account|lot|hold|_change|posting|journal_entry)( |$)"
            scans = [line for line in plan if "Seq Scan" in line and re.search(tables, line)]
            assert not scans, "\n".join(plan)
            assert sum("Index Cond: " in line for line in plan) >= 3, "\n".join(plan)
