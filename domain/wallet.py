"""The program wallet: the hard budget behind the credits of PREFUNDED assets. Contract: basics.md 5.9 to 5.11."""

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Literal
from uuid import UUID

from db.session import Transaction
from domain import gates, idempotency
from domain.errors import not_found
from domain.ids import new_id
from domain.ledger.books import require
from domain.ledger.journal import load_accounts, write
from domain.locks import lock_programs
from domain.money import ZERO
from domain.pagination import Page, PageRequest, cut, decode_cursor, sort_name

WalletOperation = Literal["fund", "burn"]

_BALANCES = """
select a.id as asset_id, a.scale, a.issuance_policy, a.created_at, coalesce(p.balance, 0) as available
from asset a
left join account w on w.organization_id = a.organization_id and w.entity_id = %(program_id)s and w.asset_id = a.id
    and w.bucket = 'AVAILABLE' and w.entity_type = 'PROGRAM'
left join lateral (
    select balance from posting
    where organization_id = w.organization_id and account_id = w.id
    order by version desc limit 1
) p on true
where a.organization_id = %(organization_id)s and a.issuance_policy = 'PREFUNDED'
    and (w.id is not null or exists (
        select from program_asset l
        where l.organization_id = a.organization_id and l.program_id = %(program_id)s and l.asset_id = a.id))
    and (%(asset_id)s::uuid is null or a.id = %(asset_id)s)
    and (%(after_at)s::timestamptz is null or (a.created_at, a.id) < (%(after_at)s, %(after_id)s))
order by a.created_at desc, a.id desc
limit %(rows)s
"""

_SORT = sort_name(["created_at", "id"], descending=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class WalletRequest:
    """A fund or burn; `amount` is the decimal text as it was sent."""

    program_id: UUID
    asset_id: UUID
    amount: str
    description: str | None = None
    idempotency_key: str | None = None


@dataclass(frozen=True, slots=True)
class WalletResult:
    """The wallet after the operation (for a replay: now); no entry for UNLIMITED assets, which have no wallet."""

    replayed: bool
    journal_entry_id: UUID | None
    available: Decimal
    scale: int


@dataclass(frozen=True, slots=True)
class WalletBalance:
    """What a program's wallet holds of one PREFUNDED asset; HELD and DEFERRED don't exist there."""

    asset_id: UUID
    issuance_policy: str
    available: Decimal
    scale: int


async def fund(tx: Transaction, request: WalletRequest) -> WalletResult:
    """Put value from SYSTEM_ISSUANCE into the wallet; no effect on UNLIMITED assets.

    Last of all it seals the journal entry with the commit, so the caller commits at once.
    Raises Refusal: `bad_request`, `invalid_scale`, `not_found`, `idempotency_conflict`, `program_inactive` (an
    archived program), `asset_not_linked`, `asset_archived`.
    """
    return await _move(tx, "fund", request)


async def burn(tx: Transaction, request: WalletRequest) -> WalletResult:
    """Take value out of the wallet to SYSTEM_BREAKAGE; no effect on UNLIMITED assets.

    Seals and refuses like `fund`, and with `insufficient_balance` when the wallet holds less.
    """
    return await _move(tx, "burn", request)


async def wallet_balances(
    tx: Transaction, program_id: UUID, *, asset_id: UUID | None, page: PageRequest
) -> Page[WalletBalance]:
    """The wallet's PREFUNDED assets, newest first: those linked, and those it received as a redemption target.

    Raises Refusal `not_found` for an unknown program, and naming `cursor` for a bad one.
    """
    known = await tx.row(
        "select 1 from program where organization_id = %s and id = %s", (tx.organization_id, program_id)
    )
    if known is None:
        raise not_found("program")
    after_at, after_id = decode_cursor(page.cursor, _SORT, [datetime, UUID]) or (None, None)
    rows = await tx.rows(
        _BALANCES,
        {
            "organization_id": tx.organization_id,
            "program_id": program_id,
            "asset_id": asset_id,
            "after_at": after_at,
            "after_id": after_id,
            "rows": page.limit + 1,
        },
    )
    found = cut(rows, page.limit, _SORT, lambda row: (row["created_at"], row["asset_id"]))
    balances = [
        WalletBalance(row["asset_id"], row["issuance_policy"], row["available"], row["scale"]) for row in found.items
    ]
    return Page(balances, found.next_cursor)


async def _move(tx: Transaction, operation: WalletOperation, request: WalletRequest) -> WalletResult:
    terms = await gates.read_terms(tx, request.program_id, request.asset_id)
    amount = terms.amount(request.amount)
    entry_id = new_id() if terms.is_prefunded else None
    claim = await idempotency.claim(
        tx,
        request.program_id,
        operation,
        request.idempotency_key,
        payload={"asset_id": request.asset_id, "amount": amount, "description": request.description},
        result={"journal_entry_id": entry_id and str(entry_id)},
    )
    if claim.replayed:
        return await _replay(tx, request, terms, claim.result["journal_entry_id"])
    gates.require_program(terms, allowed=("ACTIVE", "SUSPENDED"))
    gates.require_usable_asset(terms)
    if entry_id is None:
        return WalletResult(False, None, ZERO, terms.scale)

    await lock_programs(tx, [request.program_id])
    books = await load_accounts(tx, [request.program_id], [request.asset_id])
    wallet = books.account("PROGRAM", request.program_id, request.asset_id, "AVAILABLE")
    if operation == "fund":
        action: Literal["FUND", "BURN"] = "FUND"
        movements = [(books.system("SYSTEM_ISSUANCE", request.asset_id), amount.copy_negate()), (wallet, amount)]
    else:
        action = "BURN"
        require(wallet.balance, amount, what="wallet balance")
        movements = [(wallet, amount.copy_negate()), (books.system("SYSTEM_BREAKAGE", request.asset_id), amount)]
    books.post(action, movements, program_id=request.program_id, description=request.description, entry_id=entry_id)
    await write(tx, books)
    return WalletResult(False, entry_id, wallet.balance, terms.scale)


async def _replay(
    tx: Transaction, request: WalletRequest, terms: gates.Terms, journal_entry_id: str | None
) -> WalletResult:
    if journal_entry_id is None:
        return WalletResult(True, None, ZERO, terms.scale)
    books = await load_accounts(tx, [request.program_id], [request.asset_id])
    available = books.balance(request.program_id, request.asset_id, "AVAILABLE")
    return WalletResult(True, UUID(journal_entry_id), available, terms.scale)
