"""Balance operations on holders by API call. Contract: holders.md 6."""

from dataclasses import dataclass
from decimal import Decimal
from typing import Literal
from uuid import UUID

from db.session import Transaction
from domain import gates, idempotency
from domain.errors import bad_field
from domain.gates import Terms
from domain.ids import new_id
from domain.ledger.books import Account, Books, Bucket, require
from domain.ledger.journal import load_accounts, write
from domain.locks import lock_participants, lock_programs

AdjustType = Literal["CREDIT", "DEBIT"]


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


@dataclass(frozen=True, slots=True)
class HolderBalance:
    """What a holder has of one asset."""

    available: Decimal
    deferred: Decimal
    held: Decimal


@dataclass(frozen=True, slots=True)
class AdjustResult:
    """What an adjust moved, and the balance after it (for a replay: the balance now)."""

    replayed: bool
    journal_entry_id: UUID
    amount: Decimal
    balance: HolderBalance
    scale: int


async def adjust(tx: Transaction, participant_id: UUID, request: AdjustRequest) -> AdjustResult:
    """Credit or debit a participant. Contract: holders.md 6.2; gates in the order of holders.md 1.

    Last of all it seals the journal entry with the commit, so the caller commits at once.
    Raises Refusal: `bad_request`, `invalid_scale`, `not_found`, `idempotency_conflict`, `participant_inactive`,
    `program_inactive`, `asset_not_linked`, `asset_archived`, `max_transaction_amount_exceeded`,
    `insufficient_balance`, `insufficient_program_balance`.
    """
    terms = await gates.read_terms(tx, request.program_id, request.asset_id)
    amount = terms.amount(request.amount)
    gates.require_simple(terms)
    _require_available_bucket(request)
    entry_id = new_id()
    claim = await idempotency.claim(
        tx,
        request.program_id,
        "adjust",
        request.idempotency_key,
        payload=_payload(participant_id, request, amount),
        result={"journal_entry_id": str(entry_id)},
    )
    if claim.replayed:
        books = await load_accounts(tx, [participant_id], [request.asset_id])
        first_entry_id = UUID(claim.result["journal_entry_id"])
        return AdjustResult(True, first_entry_id, amount, holder_balance(books, participant_id, terms), terms.scale)

    draws_on_wallet = request.type == "CREDIT" and terms.is_prefunded
    if draws_on_wallet:
        await lock_programs(tx, [request.program_id])
    participants = await lock_participants(tx, [participant_id])
    gates.require_active_participant(participants.get(participant_id))
    gates.require_program(terms)
    gates.require_usable_asset(terms)
    gates.require_within_cap(terms, amount)

    touched = [participant_id, request.program_id] if draws_on_wallet else [participant_id]
    books = await load_accounts(tx, touched, [request.asset_id])
    holder = books.account("PARTICIPANT", participant_id, request.asset_id, request.bucket)
    if request.type == "CREDIT":
        movements = [(credit_source(books, terms, amount), amount.copy_negate()), (holder, amount)]
    else:
        if not request.allow_negative:
            require(holder.balance, amount)
        movements = [(holder, amount.copy_negate()), (books.system("SYSTEM_BREAKAGE", request.asset_id), amount)]
    books.post(
        request.type, movements, program_id=request.program_id, description=request.description, entry_id=entry_id
    )
    await write(tx, books)
    return AdjustResult(False, entry_id, amount, holder_balance(books, participant_id, terms), terms.scale)


def credit_source(books: Books, terms: Terms, amount: Decimal) -> Account:
    """The account that a credit of `amount` comes from: the program's wallet if PREFUNDED, else SYSTEM_ISSUANCE.

    The program's row is locked if PREFUNDED. Raises Refusal `insufficient_program_balance` when the wallet is short.
    """
    if not terms.is_prefunded:
        return books.system("SYSTEM_ISSUANCE", terms.asset_id)
    wallet = books.account("PROGRAM", terms.program_id, terms.asset_id, "AVAILABLE")
    require(wallet.balance, amount, code="insufficient_program_balance", what="program balance")
    return wallet


def holder_balance(books: Books, holder_id: UUID, terms: Terms) -> HolderBalance:
    """The holder's three buckets of the asset, as they stand in `books`."""
    return HolderBalance(
        available=books.balance(holder_id, terms.asset_id, "AVAILABLE"),
        deferred=books.balance(holder_id, terms.asset_id, "DEFERRED"),
        held=books.balance(holder_id, terms.asset_id, "HELD"),
    )


def _require_available_bucket(request: AdjustRequest) -> None:
    # A credit into HELD makes a hold record and a debit from HELD uses one up; neither exists yet.
    if request.bucket != "AVAILABLE":
        raise bad_field("bucket", f"adjusting the bucket {request.bucket} is not supported by this version yet")


def _payload(participant_id: UUID, request: AdjustRequest, amount: Decimal) -> dict[str, object]:
    return {
        "participant_id": participant_id,
        "asset_id": request.asset_id,
        "type": request.type,
        "amount": amount,
        "description": request.description,
        "bucket": request.bucket,
        "allow_negative": request.allow_negative,
    }
