"""Balance operations on participants and groups by API call. Contract: holders.md 6, gates in the order of 1.

Each is one transaction that ends by sealing its entry with the commit, so the caller commits at once after it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Literal
from uuid import UUID

from db.session import Transaction
from domain import gates, groups, idempotency
from domain.errors import Refusal, bad_field
from domain.gates import Terms
from domain.ids import new_id
from domain.ledger import movements
from domain.ledger.books import Account, Books, Bucket, Entry, require
from domain.ledger.holdings import load_holds, load_lots, load_oldest_holds
from domain.ledger.holds import Hold
from domain.ledger.journal import load_accounts, write
from domain.ledger.lots import Part, Selection, total
from domain.ledger.movements import Cause, HolderType, HoldTerms, Position
from domain.locks import lock_groups, lock_participants, lock_programs
from domain.money import ZERO

AdjustType = Literal["CREDIT", "DEBIT"]
Operation = Literal["HOLD", "RELEASE", "FORFEIT", "VOID_HOLD"]
OnExpiry = Literal["RELEASE", "FORFEIT"]

LOT_IDS_PER_CALL = 1_000

_RESERVED = "value of a pending redemption is reserved: confirm or cancel the redemption instead"
_NEEDS_ACTIVE_PARTICIPANT = frozenset({"HOLD", "RELEASE"})
_TAKES_NEW_VALUE = frozenset({"HOLD"})


@dataclass(frozen=True, slots=True)
class Holder:
    """Whose balance an operation concerns."""

    type: HolderType
    id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class AdjustRequest:
    """A credit or debit by hand; `amount` is the decimal text as it was sent."""

    program_id: UUID
    asset_id: UUID
    type: AdjustType
    amount: str
    description: str
    bucket: Bucket = "AVAILABLE"
    allow_negative: bool = False
    idempotency_key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationRequest:
    """A hold, release, forfeit or void-hold; `amount` is the decimal text as it was sent, None for all of it.

    `bucket` is for forfeit; `lot_ids`, `earned_*` and `reference_id` for LOT assets. `hold_id` names the one hold to
    release or forfeit, and the id that a new one gets. A new hold may have an end, as an instant or as a duration from
    now (not both), and then `on_expiry`, by default RELEASE.
    """

    operation: Operation
    program_id: UUID
    asset_id: UUID
    description: str
    amount: str | None = None
    bucket: Literal["AVAILABLE", "HELD"] = "AVAILABLE"
    reference_id: str | None = None
    lot_ids: Sequence[UUID] | None = None
    earned_from: datetime | None = None
    earned_to: datetime | None = None
    hold_id: UUID | None = None
    expires_at: datetime | None = None
    expires_in: timedelta | None = None
    on_expiry: OnExpiry | None = None
    idempotency_key: str | None = None

    @property
    def has_end(self) -> bool:
        """Whether the hold shall end by itself."""
        return self.expires_at is not None or self.expires_in is not None

    @property
    def named_hold(self) -> UUID | None:
        """The existing hold that a release or forfeit is about."""
        return None if self.operation == "HOLD" else self.hold_id


@dataclass(frozen=True, slots=True)
class HolderBalance:
    """What a holder has of one asset."""

    available: Decimal
    deferred: Decimal
    held: Decimal


@dataclass(frozen=True, slots=True)
class AdjustResult:
    """What an adjust moved, and the balance after it (for a replay: the balance now).

    `ended_holds` are those that a debit of HELD used up, as in `OperationResult`.
    """

    replayed: bool
    journal_entry_id: UUID
    amount: Decimal
    balance: HolderBalance
    scale: int
    ended_holds: tuple[UUID, ...] = ()


@dataclass(frozen=True, slots=True)
class OperationResult:
    """What an operation moved, and the balance after it (for a replay: the balance now).

    `lots` are the lots now in the target state, with the amounts moved, in FIFO order; None on SIMPLE assets.
    `ended_holds` are the holds with a workflow of their own of which nothing remains now; empty for a replay.
    """

    replayed: bool
    journal_entry_id: UUID
    amount: Decimal
    balance: HolderBalance
    scale: int
    lots: list[tuple[UUID, Decimal]] | None
    hold_id: UUID | None
    ended_holds: tuple[UUID, ...] = ()


async def adjust(tx: Transaction, holder: Holder, request: AdjustRequest) -> AdjustResult:
    """Credit or debit a holder. Contract: holders.md 6.2.

    Raises Refusal: `bad_request`, `invalid_scale`, `not_found`, `idempotency_conflict`, `participant_inactive`,
    `group_archived`, `program_inactive`, `asset_not_linked`, `asset_archived`, `max_transaction_amount_exceeded`,
    `insufficient_balance`, `insufficient_program_balance`.
    """
    terms = await gates.read_terms(tx, request.program_id, request.asset_id)
    amount = terms.amount(request.amount)
    if request.type == "DEBIT" and request.allow_negative and request.bucket == "HELD":
        raise bad_field("allow_negative", "a debit from HELD cannot go below zero")
    entry_id = new_id()
    claim = await idempotency.claim(
        tx,
        request.program_id,
        "adjust",
        request.idempotency_key,
        payload=_adjust_payload(holder, request, amount),
        result={"journal_entry_id": str(entry_id)},
    )
    if claim.replayed:
        books = await load_accounts(tx, [holder.id], [request.asset_id])
        first_entry_id = UUID(claim.result["journal_entry_id"])
        return AdjustResult(True, first_entry_id, amount, holder_balance(books, holder, terms), terms.scale)

    draws_on_wallet = request.type == "CREDIT" and terms.is_prefunded
    if draws_on_wallet:
        await lock_programs(tx, [request.program_id])
    _require_usable(holder, await _lock(tx, holder), needs_active=True)
    gates.require_program(terms)
    gates.require_usable_asset(terms)
    gates.require_within_cap(terms, amount)

    touched = [holder.id, request.program_id] if draws_on_wallet else [holder.id]
    books = await load_accounts(tx, touched, [request.asset_id])
    cause = Cause(entry_id, request.program_id, tx.now, request.description)
    await _move(tx, books, _position(holder, terms), cause, terms, request, amount)
    await write(tx, books)
    balance = holder_balance(books, holder, terms)
    return AdjustResult(False, entry_id, amount, balance, terms.scale, _ended_holds(books))


async def operate(tx: Transaction, holder: Holder, request: OperationRequest) -> OperationResult:
    """Hold, release, forfeit or void. Contract: holders.md 6.3 to 6.6.

    Raises Refusal: `bad_request`, `invalid_scale`, `not_found`, `idempotency_conflict`, `participant_inactive`,
    `group_archived`, `program_inactive`, `asset_not_linked`, `asset_archived`, `insufficient_balance`, `conflict`,
    `hold_not_active`.
    """
    terms = await gates.read_terms(tx, request.program_id, request.asset_id)
    amount = None if request.amount is None else terms.amount(request.amount)
    _check_shape(terms, request)
    entry_id, hold_id = new_id(), request.hold_id or new_id()
    operation = request.operation.lower()
    claim = await idempotency.claim(
        tx,
        request.program_id,
        operation,
        request.idempotency_key,
        payload=_operation_payload(holder, request, amount),
        result={},
    )
    if claim.replayed:
        return await _replay(tx, holder, terms, claim.result)

    hold_terms = _hold_terms(request, hold_id, tx.now)
    sources = await _void_sources(tx, holder, request) if request.operation == "VOID_HOLD" else []
    if terms.is_prefunded and sources:
        await lock_programs(tx, sources)
    _require_usable(holder, await _lock(tx, holder), needs_active=request.operation in _NEEDS_ACTIVE_PARTICIPANT)
    if request.operation in _TAKES_NEW_VALUE:
        gates.require_program(terms)
        gates.require_usable_asset(terms)
    else:
        gates.require_linked_asset(terms)

    books = await load_accounts(tx, [holder.id, *(sources if terms.is_prefunded else [])], [request.asset_id])
    position = _position(holder, terms)
    reference_id = request.reference_id
    if request.named_hold is not None:
        await load_holds(tx, books.holds, [request.named_hold])
        hold = books.holds.get(request.named_hold)
        _require_takeable(hold, amount)
        reference_id = hold.reference_id
    cause = Cause(entry_id, request.program_id, tx.now, request.description, reference_id=reference_id)
    selection = _selection(position, request, tx.now)
    await _load(tx, books, position, selection, amount)
    entry, parts = _perform(books, position, cause, request, selection, amount, hold_terms, terms)
    await write(tx, books)
    result = OperationResult(
        False,
        entry_id,
        _moved(entry),
        holder_balance(books, holder, terms),
        terms.scale,
        [(part.lot.id, part.amount) for part in parts] if terms.has_lots else None,
        hold_id if request.operation == "HOLD" else request.named_hold,
        _ended_holds(books),
    )
    await idempotency.remember(tx, request.program_id, operation, request.idempotency_key, _remembered(result))
    return result


async def find_operation(tx: Transaction, holder: Holder, request: OperationRequest) -> OperationResult | None:
    """What the first use of the request's key did, without waiting for one under way; None where there was none.

    Nothing is written. Raises Refusal: `bad_request`, `invalid_scale`, `not_found`, `idempotency_conflict`.
    """
    terms = await gates.read_terms(tx, request.program_id, request.asset_id)
    amount = None if request.amount is None else terms.amount(request.amount)
    _check_shape(terms, request)
    if request.idempotency_key is None:
        return None
    payload = _operation_payload(holder, request, amount)
    operation = request.operation.lower()
    found = await idempotency.find(tx, request.program_id, operation, request.idempotency_key, payload)
    return None if found is None else await _replay(tx, holder, terms, found)


async def await_operation(tx: Transaction, holder: Holder, request: OperationRequest) -> OperationResult | None:
    """As `find_operation`, but a first use that is under way is waited for; the request has a key.

    Where there was none the key now belongs to this transaction, which is to be rolled back.
    """
    terms = await gates.read_terms(tx, request.program_id, request.asset_id)
    amount = None if request.amount is None else terms.amount(request.amount)
    payload = _operation_payload(holder, request, amount)
    operation = request.operation.lower()
    claim = await idempotency.claim(tx, request.program_id, operation, request.idempotency_key, payload, result={})
    return await _replay(tx, holder, terms, claim.result) if claim.replayed else None


def require_future_end(request: OperationRequest, now: datetime) -> datetime | None:
    """When a hold that is made now ends, None for never. Raises Refusal `bad_request` unless that lies in the future.

    Only a first use of a key is judged by the clock: a replay may come after the end.
    """
    end = request.expires_at if request.expires_in is None else now + request.expires_in
    if end is not None and end <= now:
        raise bad_field("expires_at", "must lie in the future", expected="a later timestamp")
    return end


def credit_source(books: Books, terms: Terms, amount: Decimal) -> Account:
    """The account that a credit of `amount` comes from: the program's wallet if PREFUNDED, else SYSTEM_ISSUANCE.

    The program's row is locked if PREFUNDED. Raises Refusal `insufficient_program_balance` when the wallet is short.
    """
    if not terms.is_prefunded:
        return books.system("SYSTEM_ISSUANCE", terms.asset_id)
    wallet = books.account("PROGRAM", terms.program_id, terms.asset_id, "AVAILABLE")
    require(wallet.balance, amount, code="insufficient_program_balance", what="program balance")
    return wallet


def holder_balance(books: Books, holder: Holder, terms: Terms) -> HolderBalance:
    """The holder's three buckets of the asset, as they stand in `books`."""
    return HolderBalance(
        available=books.balance(holder.id, terms.asset_id, "AVAILABLE"),
        deferred=books.balance(holder.id, terms.asset_id, "DEFERRED"),
        held=books.balance(holder.id, terms.asset_id, "HELD"),
    )


def _ended_holds(books: Books) -> tuple[UUID, ...]:
    """The holds with a workflow of their own of which nothing remains now."""
    return tuple(hold.id for hold in books.holds.ended if hold.carrier == "WORKFLOW")


# --- adjust ----------------------------------------------------------------------------------------------------------


async def _move(
    tx: Transaction,
    books: Books,
    position: Position,
    cause: Cause,
    terms: Terms,
    request: AdjustRequest,
    amount: Decimal,
) -> None:
    if request.type == "CREDIT":
        source = credit_source(books, terms, amount)
        if request.bucket == "HELD":
            movements.credit_held(books, position, cause, amount, source, HoldTerms(new_id()))
        else:
            movements.credit(books, position, cause, amount, source)
    elif request.bucket == "HELD":
        await _load_held(tx, books, position, position.select("HELD", tx.now), amount)
        movements.debit_held(books, position, cause, amount)
    else:
        if position.has_lots:
            spendable = position.select("AVAILABLE", tx.now)
            await load_lots(tx, books.lots, spendable, amount)
            if request.allow_negative and total(books.lots.take(spendable, amount)) < amount:
                # Below zero every lot goes, the expired ones by their own entries.
                every = Selection(position.holder_id, position.asset_id, "AVAILABLE")
                await load_lots(tx, books.lots, every, None)
        movements.debit(books, position, cause, amount, allow_negative=request.allow_negative)


# --- hold, release, forfeit, void-hold -------------------------------------------------------------------------------


def _perform(
    books: Books,
    position: Position,
    cause: Cause,
    request: OperationRequest,
    selection: Selection,
    amount: Decimal | None,
    hold_terms: HoldTerms,
    terms: Terms,
) -> tuple[Entry, list[Part]]:
    """What the request asks for, done to the books; the entry, and the lots as they are now."""
    if request.operation == "HOLD":
        return movements.hold(books, position, cause, amount, hold_terms, selection)
    if request.operation == "RELEASE":
        return movements.release(books, position, cause, amount, selection, only=request.named_hold)
    if request.operation == "VOID_HOLD":
        # A program that first credited under the reference since its wallets were locked is not loaded: opening its
        # wallet a second time is refused by the database, and the whole operation is repeated.
        programs = {lot.program_id for lot in books.lots.matching(selection)}
        sources = {program_id: _return_account(books, terms, program_id) for program_id in programs}
        return movements.void_hold(books, position, cause, selection, sources)
    if request.bucket == "HELD":
        return movements.forfeit_held(books, position, cause, amount, selection, only=request.named_hold)
    return movements.forfeit(books, position, cause, amount, selection)


def _return_account(books: Books, terms: Terms, program_id: UUID) -> Account:
    """Where value that a program had issued goes back to. Contract: README.md "Small print"."""
    if not terms.is_prefunded:
        return books.system("SYSTEM_ISSUANCE", terms.asset_id)
    return books.account("PROGRAM", program_id, terms.asset_id, "AVAILABLE")


async def _void_sources(tx: Transaction, holder: Holder, request: OperationRequest) -> list[UUID]:
    """The programs whose value a void would give back, read before the locks: programs are locked before holders."""
    rows = await tx.execute(
        "select distinct program_id from lot where organization_id = %s and entity_id = %s and asset_id = %s"
        " and reference_id = %s and status = 'HELD' and is_provisional",
        (tx.organization_id, holder.id, request.asset_id, request.reference_id),
    )
    return [row[0] for row in await rows.fetchall()]


def _selection(position: Position, request: OperationRequest, now: datetime) -> Selection:
    bucket: Literal["AVAILABLE", "HELD"] = "HELD"
    if request.operation == "HOLD" or (request.operation == "FORFEIT" and request.bucket == "AVAILABLE"):
        bucket = "AVAILABLE"
    # A hold stamps its lots with the reference; everything else finds them by it.
    reference_id = None if request.operation == "HOLD" else request.reference_id
    return position.select(
        bucket,
        now,
        reference_id=reference_id,
        lot_ids=frozenset(request.lot_ids) if request.lot_ids is not None else None,
        earned_from=request.earned_from,
        earned_to=request.earned_to,
        hold_id=request.named_hold,
        only_provisional=request.operation == "VOID_HOLD",
    )


async def _load(
    tx: Transaction, books: Books, position: Position, selection: Selection, amount: Decimal | None
) -> None:
    if selection.status == "HELD":
        await _load_held(tx, books, position, selection, amount)
    elif position.has_lots:
        await load_lots(tx, books.lots, selection, amount)


async def _load_held(
    tx: Transaction, books: Books, position: Position, selection: Selection, amount: Decimal | None
) -> None:
    """The lots and holds that something taken out of HELD may use up."""
    if position.has_lots:
        await load_lots(tx, books.lots, selection, amount)
        hold_ids = {lot.hold_id for lot in books.lots.matching(selection) if lot.hold_id is not None}
        await load_holds(tx, books.holds, hold_ids)
        if _names_lots(selection) and await _is_reserved(tx, selection):
            raise Refusal("conflict", _RESERVED)
    elif selection.hold_id is None:
        await load_oldest_holds(tx, books.holds, position.holder_id, position.asset_id, amount)


def _names_lots(selection: Selection) -> bool:
    return selection.hold_id is None and (selection.reference_id is not None or selection.lot_ids is not None)


async def _is_reserved(tx: Transaction, selection: Selection) -> bool:
    """Whether lots that the selection names are reserved by a pending redemption."""
    cursor = await tx.execute(
        "select exists (select from lot l join hold h on h.organization_id = l.organization_id and h.id = l.hold_id"
        " where l.organization_id = %s and l.entity_id = %s and l.asset_id = %s and l.status = 'HELD'"
        " and h.kind = 'REDEMPTION' and (l.reference_id = %s or l.id = any(%s)))",
        (
            tx.organization_id,
            selection.entity_id,
            selection.asset_id,
            selection.reference_id,
            list(selection.lot_ids or ()),
        ),
    )
    row = await cursor.fetchone()
    return bool(row and row[0])


# --- shape, locks, results -------------------------------------------------------------------------------------------


def _check_shape(terms: Terms, request: OperationRequest) -> None:
    if not terms.has_lots:
        for field in ("lot_ids", "earned_from", "earned_to", "reference_id"):
            if getattr(request, field) is not None:
                raise bad_field(field, "only LOT assets have lots to choose from", expected="absent")
        if request.operation == "VOID_HOLD":
            raise bad_field("asset_id", "only LOT assets have provisional value to void", expected="a LOT asset")
    if request.operation == "VOID_HOLD":
        for field in ("amount", "lot_ids", "earned_from", "earned_to"):
            if getattr(request, field) is not None:
                raise bad_field(field, "a void takes the whole accrual of the reference", expected="absent")
    if request.earned_from and request.earned_to and request.earned_to < request.earned_from:
        raise bad_field("earned_to", "must not be before earned_from", expected="timestamp")
    if request.expires_at is not None and request.expires_in is not None:
        raise bad_field("expires_in", "must not be sent together with expires_at", expected="absent")
    if request.expires_in is not None and request.expires_in <= timedelta(0):
        raise bad_field("expires_in", "must lie in the future", expected="a positive duration")
    if request.on_expiry is not None and not request.has_end:
        raise bad_field("on_expiry", "needs expires_at or expires_in", expected="absent")


def _hold_terms(request: OperationRequest, hold_id: UUID, now: datetime) -> HoldTerms:
    end = require_future_end(request, now)
    if end is None:
        return HoldTerms(hold_id)
    return HoldTerms(hold_id, end, request.on_expiry or "RELEASE", "WORKFLOW")


def _require_takeable(hold: Hold, amount: Decimal | None) -> None:
    """Refuse to take `amount` of a hold that has ended, that a redemption owns, or of which less remains."""
    if hold.status != "ACTIVE":
        raise Refusal("hold_not_active", f"hold is {hold.status}")
    if hold.kind == "REDEMPTION":
        raise Refusal("conflict", _RESERVED)
    require(hold.remaining, amount or ZERO, what="remaining amount of the hold")


async def _lock(tx: Transaction, holder: Holder) -> Mapping[str, Any] | None:
    lock = lock_participants if holder.type == "PARTICIPANT" else lock_groups
    return (await lock(tx, [holder.id])).get(holder.id)


def _require_usable(holder: Holder, row: Mapping[str, Any] | None, *, needs_active: bool) -> None:
    if holder.type == "GROUP":
        groups.require_active(row)
    else:
        gates.require_participant(row, needs_active=needs_active)


def _position(holder: Holder, terms: Terms) -> Position:
    return Position(holder.type, holder.id, terms.asset_id, terms.has_lots)


def _moved(entry: Entry) -> Decimal:
    """What an entry moved: the amount that its first posting takes away."""
    return entry.lines[0].amount.copy_abs()


async def _replay(tx: Transaction, holder: Holder, terms: Terms, result: Mapping[str, Any]) -> OperationResult:
    books = await load_accounts(tx, [holder.id], [terms.asset_id])
    lots = result["lots"]
    return OperationResult(
        True,
        UUID(result["journal_entry_id"]),
        Decimal(result["amount"]),
        holder_balance(books, holder, terms),
        terms.scale,
        None if lots is None else [(UUID(lot_id), Decimal(amount)) for lot_id, amount in lots],
        UUID(result["hold_id"]) if result["hold_id"] else None,
    )


def _remembered(result: OperationResult) -> dict[str, Any]:
    return {
        "journal_entry_id": str(result.journal_entry_id),
        "amount": str(result.amount),
        "lots": None if result.lots is None else [[str(lot_id), str(amount)] for lot_id, amount in result.lots],
        "hold_id": str(result.hold_id) if result.hold_id else None,
    }


def _adjust_payload(holder: Holder, request: AdjustRequest, amount: Decimal) -> dict[str, object]:
    return {
        "holder_type": holder.type,
        "holder_id": holder.id,
        "asset_id": request.asset_id,
        "type": request.type,
        "amount": amount,
        "description": request.description,
        "bucket": request.bucket,
        "allow_negative": request.allow_negative,
    }


def _operation_payload(holder: Holder, request: OperationRequest, amount: Decimal | None) -> dict[str, object]:
    return {
        "holder_type": holder.type,
        "holder_id": holder.id,
        "asset_id": request.asset_id,
        "amount": amount,
        "description": request.description,
        "bucket": request.bucket if request.operation == "FORFEIT" else None,
        "reference_id": request.reference_id,
        "lot_ids": sorted(map(str, request.lot_ids)) if request.lot_ids is not None else None,
        "earned_from": request.earned_from,
        "earned_to": request.earned_to,
        "hold_id": request.named_hold,
        "expires_at": request.expires_at,
        "expires_in": request.expires_in and str(request.expires_in),
        "on_expiry": (request.on_expiry or "RELEASE") if request.has_end else None,
    }
