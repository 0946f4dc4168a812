"""Checking the ledger: the newest entries in one snapshot, or the whole chain from genesis in pages.

Every hash is computed again in Python from what is stored, with nothing from `seal_entries`, the database's function
that computed it first. Contract: endpoints.md "GET /v1/reports/integrity", holders.md 8.4, README.md "Hash chain".

The whole chain is a `Walk`: a small value that `advance` moves on by one page, so that a request walks in one
transaction, a command in one per page, and either can show its progress. Its target is the head as it was at the
start: entries written meanwhile belong to the next walk. A background verification keeps it between activities as JSON
(`save`, `resume`). Every entry also ties each of its postings to the one before it in its account (version + 1, balance
+ amount); from genesis on, that is the same as folding every account from zero.

After the chain come the stages that follow from it: postings without an entry, then what is projected from the ledger.
Accounts are held against the lots and holds that make them, lots and holds against their changes, holds against the
lots in them. Each is checked
within one statement, so in one snapshot, as it is then: writers change an account and its projections in one commit.

Hashing is computation, and runs in a thread: a request's event loop goes on serving others.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal, DecimalException
from itertools import groupby
from operator import attrgetter
from typing import Any, ClassVar, Literal, LiteralString, NamedTuple, ParamSpec
from uuid import UUID

import orjson
from pydantic import ConfigDict, TypeAdapter

from db.session import Transaction
from domain import limits
from domain.errors import not_found
from domain.ledger.canonical import GENESIS_HASH, HASH_VERSION, HashedPosting, entry_body, entry_hash, entry_tail
from domain.ledger.moments import Moment
from domain.money import EXACT, ZERO, format_plain

P = ParamSpec("P")

Stage = Literal["POSTINGS", "ACCOUNTS", "LOTS", "HOLDS", "DONE"]
"""What a walk checks once the chain is done, in this order."""

_STORED_COLUMNS: LiteralString = """
    e.sequence, e.id, e.program_id, e.action_type, e.description, e.event_id, e.rule_id, e.reference_id, e.api_key_id,
    e.created_at, e.prev_hash, e.entry_hash, e.hash_version, p.id, p.asset_id, p.amount, p.version, p.balance,
    a.entity_type, a.entity_id, a.asset_id, a.bucket
"""

# The posting before is found by `<`, not by `= version - 1`: under row-level security only comparisons of plain columns
# become index conditions, and an account of a million postings would be read for each of them.
_BEFORE: LiteralString = """
left join lateral (
    select organization_id, entry_id, version, balance from posting
    where organization_id = p.organization_id and account_id = p.account_id and version < p.version
    order by version desc limit 1
) before on true
left join journal_entry before_entry on before_entry.organization_id = before.organization_id
    and before_entry.id = before.entry_id
"""

# One statement is one snapshot: head, entries and postings belong together whatever is written meanwhile. One entry
# more than the window is read, for its hash, and the one behind it, which carries the hash of the window's last.
_WINDOW: LiteralString = f"""
select coalesce(h.sequence, 0), h.hash, behind.prev_hash, {_STORED_COLUMNS},
       before.version, before.balance, before_entry.sequence
from (values (%(organization_id)s::uuid)) o (id)
left join chain_head h on h.organization_id = o.id
left join journal_entry behind on behind.organization_id = o.id and behind.sequence = %(behind)s
left join lateral (
    select * from journal_entry where organization_id = o.id and sequence < %(behind)s
    order by sequence desc limit %(rows)s
) e on true
left join posting p on p.organization_id = o.id and p.entry_id = e.id
left join account a on a.organization_id = o.id and a.id = p.account_id
{_BEFORE}
order by e.sequence, p.ordinal
"""
_END_OF_CHAIN = 2**63 - 1

_PAGE: LiteralString = f"""
select {_STORED_COLUMNS}, before.version, before.balance, before_entry.sequence
from (
    select * from journal_entry
    where organization_id = %(organization_id)s and sequence > %(after)s and sequence <= %(head)s
    order by sequence limit %(rows)s
) e
left join posting p on p.organization_id = e.organization_id and p.entry_id = e.id
left join account a on a.organization_id = p.organization_id and a.id = p.account_id
{_BEFORE}
order by e.sequence, p.ordinal
"""

_HEAD = """
select coalesce(h.sequence, 0) as head_sequence, h.hash as head_hash, coalesce(e.sequence, 0) as newest
from organization o
left join chain_head h on h.organization_id = o.id
left join lateral (
    select sequence from journal_entry where organization_id = o.id order by sequence desc limit 1
) e on true
where o.id = %s
"""

_ORPHANS = """
with page as (
    select entry_id, ordinal from posting
    where organization_id = %(organization_id)s and (entry_id, ordinal) > (%(entry_id)s, %(ordinal)s)
    order by entry_id, ordinal limit %(rows)s)
select last.entry_id, last.ordinal, orphan.entry_id, (select count(*) from page)
from (select * from page order by entry_id desc, ordinal desc limit 1) last
left join lateral (
    select page.entry_id from page
    where not exists (
        select from journal_entry e where e.organization_id = %(organization_id)s and e.id = page.entry_id)
    limit 1
) orphan on true
"""
_ORPHANS_PAGE = 10 * limits.VERIFY_PAGE

# Accounts with what their lots and holds make of them, probe by probe.
_ACCOUNTS: LiteralString = """
select a.id, a.entity_type, a.entity_id, a.asset_id, a.bucket, s.inventory_mode = 'LOT', coalesce(newest.balance, 0),
       lots.remaining, holds.remaining
from (
    select * from account where organization_id = %(organization_id)s and id > %(after)s order by id limit %(rows)s
) a
left join asset s on s.organization_id = a.organization_id and s.id = a.asset_id
left join lateral (
    select balance from posting where organization_id = a.organization_id and account_id = a.id
    order by version desc limit 1
) newest on true
cross join lateral (
    select coalesce(sum(remaining), 0) as remaining from lot
    where organization_id = a.organization_id and entity_id = a.entity_id and asset_id = a.asset_id
        and status = a.bucket and remaining > 0 and entity_type = a.entity_type
) lots
cross join lateral (
    select coalesce(sum(remaining), 0) as remaining from hold
    where organization_id = a.organization_id and entity_id = a.entity_id and asset_id = a.asset_id
        and status = 'ACTIVE' and entity_type = a.entity_type
) holds
order by a.id
"""

# Lots or holds with the sum of their changes, whether the account that they are part of is there, and whether the entry
# that came last to them explains their status. Where all changes left the status that it has, none has to be the last:
# the order of changes, which is that of their entries, is looked up for the others only. One without changes is what
# its own entry made it, and that entry has put value into its account.
_CHANGED: LiteralString = """
select r.id, r.entity_id, r.asset_id, {bucket}, r.status, r.amount, r.remaining, changes.delta, a.id is not null,
       coalesce(newest.entry_id, r.entry_id),
       case when changes.lowest is null then made.amount is not null
            else coalesce(newest.status = r.status, true) end,
       {in_lots}
from (
    select * from {table} where organization_id = %(organization_id)s and id > %(after)s order by id limit %(rows)s
) r
cross join lateral (
    select coalesce(sum(delta), 0) as delta, min(status) as lowest, max(status) as highest from {table}_change
    where organization_id = r.organization_id and {table}_id = r.id
) changes
left join lateral (
    select c.entry_id, c.status from {table}_change c
    left join journal_entry e on e.organization_id = c.organization_id and e.id = c.entry_id
    where c.organization_id = r.organization_id and c.{table}_id = r.id
        and (changes.lowest <> changes.highest or changes.lowest <> r.status)
    order by e.sequence desc nulls last, {tie} limit 1
) newest on true
left join lateral (
    select id from account
    where organization_id = r.organization_id and entity_id = r.entity_id and asset_id = r.asset_id
        and bucket = {bucket} and entity_type = r.entity_type
    limit 1
) a on true
left join lateral (
    select amount from posting
    where organization_id = r.organization_id and entry_id = r.entry_id and account_id = a.id and amount > 0
        and changes.lowest is null
    limit 1
) made on true
{further}
order by r.id
"""
_LOTS: LiteralString = _CHANGED.format(table="lot", bucket="r.status", tie="c.ordinal desc", in_lots="null", further="")
_HOLDS: LiteralString = _CHANGED.format(
    table="hold",
    bucket="'HELD'",
    tie="c.entry_id",
    in_lots="case when s.inventory_mode = 'LOT' then coalesce(lots.remaining, 0) end",
    further="""
left join asset s on s.organization_id = r.organization_id and s.id = r.asset_id
left join lateral (
    select sum(remaining) as remaining from lot
    where organization_id = r.organization_id and hold_id = r.id and status = 'HELD' and entity_id = r.entity_id
        and asset_id = r.asset_id and s.inventory_mode = 'LOT'
) lots on true
""",
)

_BEFORE_ALL = UUID(int=0)
"""Where pages in the order of ids begin."""
_IN_ORDER = "set local enable_bitmapscan = off"
"""Pages are read along the index that has their order. Tenants have no statistics (0001_guards.sql), so the planner
takes a long ledger for a short one and would rather read all that follows and sort it, for every page."""
_HOLDERS = ("PARTICIPANT", "GROUP")
_OPEN = ("DEFERRED", "AVAILABLE", "HELD", "ACTIVE")
"""The statuses of lots and holds of which something remains."""


@dataclass(frozen=True, slots=True)
class Integrity:
    """The attestation of `GET /v1/reports/integrity`; sequences are None where nothing was checked."""

    valid: bool
    organization_id: UUID
    checked_from_sequence: int | None
    checked_to_sequence: int | None
    entries_checked: int
    head_sequence: int
    head_hash: bytes
    first_invalid_entry_id: UUID | None
    checked_at: datetime


@dataclass(slots=True)
class Walk:
    """How far a check of the whole chain has come. `problem` says in words what is wrong; None so far nothing."""

    organization_id: UUID
    head_sequence: int
    head_hash: bytes
    sequence: int = 0
    hash: bytes = GENESIS_HASH
    entries_checked: int = 0
    first_invalid_entry_id: UUID | None = None
    problem: str | None = None
    finished: bool = False
    last_posting: tuple[UUID, int] = (_BEFORE_ALL, -1)
    """How far the search for postings without an entry has come, after the chain."""
    stage: Stage = "POSTINGS"
    last_id: UUID = _BEFORE_ALL
    """How far the stage has come through accounts, lots or holds, in the order of their ids."""
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(ser_json_bytes="hex", val_json_bytes="hex")

    @property
    def valid(self) -> bool:
        """Whether everything checked so far holds."""
        return self.problem is None

    @property
    def chain_is_done(self) -> bool:
        """Whether every entry up to the head has been checked."""
        return self.sequence >= self.head_sequence


async def check_window(tx: Transaction, window: int, moment: Moment | None = None) -> Integrity:
    """Check the newest `window` entries against each other, their predecessor and the head, in one snapshot.

    With `moment` they are the newest as of then, and the last is held against the entry behind it, if there is one;
    the head is the chain's as it is now. `window` is 1 to limits.INTEGRITY_WINDOW_MAX.
    """
    behind = _END_OF_CHAIN if moment is None else moment.sequence + 1
    await tx.execute(_IN_ORDER)
    params = {"organization_id": tx.organization_id, "rows": window + 1, "behind": behind}
    rows = await (await tx.execute(_WINDOW, params)).fetchall()
    return await asyncio.to_thread(_attest, tx.organization_id, rows, window, moment, tx.now)


async def begin_walk(tx: Transaction) -> Walk:
    """A walk over the whole chain of the transaction's organization, to its head as it is now.

    Raises Refusal `not_found` for an organization that doesn't exist.
    """
    row = await tx.row(_HEAD, (tx.organization_id,))
    if row is None:
        raise not_found("organization")
    walk = Walk(tx.organization_id, row["head_sequence"], bytes(row["head_hash"] or GENESIS_HASH))
    if row["newest"] > walk.head_sequence:
        walk.problem = f"there are entries behind the head, up to sequence {row['newest']}"
    return walk


async def advance(tx: Transaction, walk: Walk) -> bool:
    """Check the next page; False once the walk has ended, at the first problem or with nothing left to check."""
    if walk.problem is None:
        await tx.execute(_IN_ORDER)
        await (_STAGES[walk.stage] if walk.chain_is_done else _check_page)(tx, walk)
    walk.finished = walk.problem is not None or walk.stage == "DONE"
    return not walk.finished


async def verify_chain(tx: Transaction) -> Walk | None:
    """Check the whole chain within one transaction, as a request does.

    None for a chain of more than limits.VERIFY_IN_REQUEST entries: that takes a background verification.
    """
    walk = await begin_walk(tx)
    if walk.head_sequence > limits.VERIFY_IN_REQUEST:
        return None
    while await advance(tx, walk):
        pass
    return walk


def save(walk: Walk) -> dict[str, Any]:
    """The walk as an object of JSON: a few hundred bytes, whatever the length of the chain."""
    saved: dict[str, Any] = _AS_JSON.dump_python(walk, mode="json")
    return saved


def resume(saved: dict[str, Any]) -> Walk:
    """The walk that `save` kept, to be moved on from where it was."""
    return _AS_JSON.validate_json(orjson.dumps(saved))


_AS_JSON = TypeAdapter(Walk)


class _Stored(NamedTuple):
    """One posting as stored, with its entry and account; None from `posting_id` on for an entry without postings."""

    sequence: int
    id: UUID
    program_id: UUID
    action_type: str
    description: str | None
    event_id: UUID | None
    rule_id: UUID | None
    reference_id: str | None
    api_key_id: UUID | None
    created_at: datetime
    prev_hash: bytes
    entry_hash: bytes
    hash_version: int
    posting_id: UUID | None
    asset_id: UUID
    amount: Decimal
    version: int | None
    balance: Decimal | None
    entity_type: str | None
    entity_id: UUID | None
    account_asset_id: UUID
    bucket: str
    version_before: int | None
    balance_before: Decimal | None
    sequence_before: int | None


class _Account(NamedTuple):
    """An account, and what the lots and holds of its holder and asset make."""

    id: UUID
    entity_type: str
    entity_id: UUID | None
    asset_id: UUID
    bucket: str
    has_lots: bool
    balance: Decimal
    lots: Decimal
    holds: Decimal


class _Changed(NamedTuple):
    """A lot or hold, the sum of its changes, and whether the entry that came last to it left it in its status.

    `in_lots` is what the lots in a hold have; None for a lot, and for a hold of an asset without lots.
    """

    id: UUID
    entity_id: UUID
    asset_id: UUID
    bucket: str
    status: str
    amount: Decimal
    remaining: Decimal
    delta: Decimal
    has_account: bool
    entry_id: UUID
    is_explained: bool
    in_lots: Decimal | None


def _attest(
    organization_id: UUID, rows: Sequence[tuple[Any, ...]], window: int, moment: Moment | None, now: datetime
) -> Integrity:
    head_sequence, head_hash, hash_behind = rows[0][0], bytes(rows[0][1] or GENESIS_HASH), rows[0][2]
    end = (head_sequence, head_hash)
    if moment is not None and hash_behind is not None:
        end = (moment.sequence, bytes(hash_behind))
    entries = _entries(_Stored(*row[3:]) for row in rows if row[3] is not None)
    sequence, previous = 0, GENESIS_HASH
    if len(entries) > window:
        before = entries.pop(0)[0]
        sequence, previous = before.sequence, bytes(before.entry_hash)
    first_invalid = None
    for lines in entries:
        if first_invalid is None and _problem(organization_id, lines, sequence, previous) is not None:
            first_invalid = lines[0].id
        sequence, previous = lines[0].sequence, bytes(lines[0].entry_hash)
    return Integrity(
        valid=first_invalid is None and (sequence, previous) == end,
        organization_id=organization_id,
        checked_from_sequence=entries[0][0].sequence if entries else None,
        checked_to_sequence=sequence if entries else None,
        entries_checked=len(entries),
        head_sequence=head_sequence,
        head_hash=head_hash,
        first_invalid_entry_id=first_invalid,
        checked_at=now,
    )


def _entries(rows: Iterable[_Stored]) -> list[list[_Stored]]:
    return [list(lines) for _, lines in groupby(rows, key=attrgetter("sequence"))]


async def _check_page(tx: Transaction, walk: Walk) -> None:
    params = {
        "organization_id": tx.organization_id,
        "after": walk.sequence,
        "head": walk.head_sequence,
        "rows": limits.VERIFY_PAGE,
    }
    cursor = await tx.execute(_PAGE, params)
    await asyncio.to_thread(_follow, walk, await cursor.fetchall())


def _follow(walk: Walk, rows: Sequence[tuple[Any, ...]]) -> None:
    """Move the walk on along the entries in `rows`, as far as they are sound."""
    if not rows:
        walk.problem = f"the newest entries are missing: the head is at {walk.head_sequence}"
        return
    for lines in _entries(_Stored(*row) for row in rows):
        problem = _problem(walk.organization_id, lines, walk.sequence, walk.hash)
        walk.entries_checked += 1
        if problem is not None:
            walk.first_invalid_entry_id, walk.problem = lines[0].id, problem
            return
        walk.sequence, walk.hash = lines[0].sequence, bytes(lines[0].entry_hash)
    if walk.chain_is_done and walk.hash != walk.head_hash:
        walk.problem = "the chain's head has another hash than its last entry"


async def _check_orphans(tx: Transaction, walk: Walk) -> None:
    """Look at the next page of all postings for some that no entry has sealed: they would change balances unseen."""
    entry_id, ordinal = walk.last_posting
    params = {
        "organization_id": tx.organization_id,
        "entry_id": entry_id,
        "ordinal": ordinal,
        "rows": _ORPHANS_PAGE,
    }
    row = await (await tx.execute(_ORPHANS, params)).fetchone()
    # A page that isn't full is the last: what is written from now on belongs to the next walk.
    if row is None or row[3] < _ORPHANS_PAGE:
        walk.stage = "ACCOUNTS"
    if row is None:
        return
    walk.last_posting = (row[0], row[1])
    if row[2] is not None:
        walk.problem = f"there are postings of an entry {row[2]} that doesn't exist"


async def _check_accounts(tx: Transaction, walk: Walk) -> None:
    """Hold the next page of accounts against the lots and holds that make them. Contract: holders.md 6.8 and 7."""
    accounts = [_Account(*row) for row in await _next_rows(tx, walk, _ACCOUNTS, then="LOTS")]
    walk.problem = next(filter(None, (_exactly(_account_problem, account) for account in accounts)), None)


async def _check_lots(tx: Transaction, walk: Walk) -> None:
    """Hold the next page of lots against their changes."""
    lots = [_Changed(*row) for row in await _next_rows(tx, walk, _LOTS, then="HOLDS")]
    walk.problem = next(filter(None, (_exactly(_change_problem, "lot", lot) for lot in lots)), None)


async def _check_holds(tx: Transaction, walk: Walk) -> None:
    """Hold the next page of holds against their changes."""
    holds = [_Changed(*row) for row in await _next_rows(tx, walk, _HOLDS, then="DONE")]
    walk.problem = next(filter(None, (_exactly(_change_problem, "hold", hold) for hold in holds)), None)


async def _next_rows(tx: Transaction, walk: Walk, query: LiteralString, *, then: Stage) -> list[tuple[Any, ...]]:
    """The next page of the walk's stage, by id. A page that isn't full is its last, and the stage `then` follows."""
    params = {"organization_id": tx.organization_id, "after": walk.last_id, "rows": limits.VERIFY_PAGE}
    rows = await (await tx.execute(query, params)).fetchall()
    if len(rows) < limits.VERIFY_PAGE:
        walk.stage, walk.last_id = then, _BEFORE_ALL
    else:
        walk.last_id = rows[-1][0]
    return rows


_STAGES: dict[Stage, Callable[[Transaction, Walk], Awaitable[None]]] = {
    "POSTINGS": _check_orphans,
    "ACCOUNTS": _check_accounts,
    "LOTS": _check_lots,
    "HOLDS": _check_holds,
}


def _account_problem(account: _Account) -> str | None:
    """What is wrong with the lots and holds of an account; only those of holders have any."""
    if account.entity_type not in _HOLDERS:
        return None
    place = f"holder {account.entity_id}, asset {account.asset_id}, {account.bucket}"
    balance = format_plain(account.balance)
    if account.lots != _lots_due(account):
        return f"{place}: the balance is {balance}, and its lots have {format_plain(account.lots)}"
    if account.bucket == "HELD" and account.holds != account.balance:
        return f"{place}: the balance is {balance}, and its active holds have {format_plain(account.holds)}"
    return None


def _lots_due(account: _Account) -> Decimal:
    """What the account's lots should make: nothing of an asset without lots, or while AVAILABLE is overdrawn."""
    if not account.has_lots:
        return ZERO
    return max(account.balance, ZERO) if account.bucket == "AVAILABLE" else account.balance


def _change_problem(what: str, row: _Changed) -> str | None:
    """What is wrong with a lot or hold, by itself."""
    name = f"holder {row.entity_id}, asset {row.asset_id}, {row.bucket}: {what} {row.id}"
    if row.remaining < ZERO or row.remaining != EXACT.add(row.amount, row.delta):
        return f"{name} has {row.remaining}, which its changes don't make of {row.amount}"
    if (row.remaining > ZERO) != (row.status in _OPEN):
        return f"{name} is {row.status} with {row.remaining}"
    if not row.is_explained:
        return f"{name} is {row.status}, and entry {row.entry_id} left it otherwise"
    if row.in_lots is not None and row.in_lots != row.remaining:
        return f"{name} has {format_plain(row.remaining)}, and the lots in it have {format_plain(row.in_lots)}"
    if row.remaining > ZERO and not row.has_account:
        return f"{name} belongs to no account"
    return None


def _exactly(check: Callable[P, str | None], *args: P.args, **kwargs: P.kwargs) -> str | None:
    """The problem that `check` finds; numbers that nobody but a tamperer could have written are one too."""
    try:
        return check(*args, **kwargs)
    except DecimalException:
        return "an amount is not a number of at most 80 digits"


def _problem(organization_id: UUID, lines: Sequence[_Stored], sequence: int, previous: bytes) -> str | None:
    """What is wrong with the entry in `lines` or the running balances it carries."""
    return _exactly(_entry_problem, organization_id, lines, sequence, previous) or _exactly(_balance_problem, lines)


def _entry_problem(organization_id: UUID, lines: Sequence[_Stored], sequence: int, previous: bytes) -> str | None:
    """What is wrong with the entry in `lines`, which should follow the entry at `sequence` with hash `previous`."""
    entry = lines[0]
    if entry.sequence != sequence + 1:
        return f"sequence {sequence + 1} is missing before it"
    if entry.posting_id is None:
        return "it has no postings"
    if any(line.entity_type is None or line.account_asset_id != line.asset_id for line in lines):
        return "a posting's account is missing or of another asset"
    totals: dict[UUID, Decimal] = {}
    for line in lines:
        totals[line.asset_id] = EXACT.add(totals.get(line.asset_id, ZERO), line.amount)
    if any(total != ZERO for total in totals.values()):
        return "its postings don't sum to zero"
    if bytes(entry.prev_hash) != previous:
        return "its prev_hash is not the hash of the entry before"
    if entry.hash_version != HASH_VERSION or bytes(entry.entry_hash) != _hash(organization_id, lines, previous):
        return "its content doesn't have its hash"
    return None


def _hash(organization_id: UUID, lines: Sequence[_Stored], previous: bytes) -> bytes:
    entry = lines[0]
    postings = []
    for line in lines:
        assert line.posting_id is not None, "an entry without postings was refused before"
        assert line.entity_type is not None, "a posting without an account was refused before"
        postings.append(
            HashedPosting(line.posting_id, line.entity_type, line.entity_id, line.asset_id, line.bucket, line.amount)
        )
    return entry_hash(
        action_type=entry.action_type,
        created_at=entry.created_at,
        body=entry_body(
            entry_id=entry.id,
            organization_id=organization_id,
            api_key_id=entry.api_key_id,
            description=entry.description,
            event_id=entry.event_id,
            postings=postings,
        ),
        prev_hash=previous,
        tail=entry_tail(program_id=entry.program_id, reference_id=entry.reference_id, rule_id=entry.rule_id),
        sequence=entry.sequence,
    )


def _balance_problem(lines: Sequence[_Stored]) -> str | None:
    """What is wrong with the running balances that these postings carry."""
    for line in lines:
        if line.entity_id is None:
            sound = line.version is None and line.balance is None
        else:
            sound = line.balance is not None and _follows(line, line.balance)
        if not sound:
            return f"posting {line.posting_id} carries a wrong balance or version"
    return None


def _follows(line: _Stored, balance: Decimal) -> bool:
    if line.version_before is None or line.balance_before is None:
        return line.version == 1 and balance == line.amount
    if line.sequence_before is None or line.sequence_before > line.sequence:
        return False
    return line.version == line.version_before + 1 and balance == EXACT.add(line.balance_before, line.amount)
