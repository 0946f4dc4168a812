"""The checks that a balance operation passes before it moves value, in the contract's order.

Shape, idempotency, holder status, program, asset link, asset status, amount cap, balance: an operation calls the ones
that concern it, in that order, so that of several reasons to refuse callers always see the same one.
Contract: holders.md 1, basics.md 5.5 and 6.4.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from uuid import UUID

from db.session import Transaction
from domain.errors import Problem, Refusal, not_found
from domain.money import format_amount, parse_amount

_READ = """
select p.status as program_status, a.inventory_mode, a.issuance_policy, a.scale, a.max_transaction_amount,
       a.status as asset_status, l.asset_id is not null as is_linked
from (values (%(organization_id)s::uuid, %(program_id)s::uuid, %(asset_id)s::uuid))
    as asked (organization_id, program_id, asset_id)
left join program p on p.organization_id = asked.organization_id and p.id = asked.program_id
left join asset a on a.organization_id = asked.organization_id and a.id = asked.asset_id
left join program_asset l on l.organization_id = asked.organization_id
    and l.program_id = asked.program_id and l.asset_id = asked.asset_id
"""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a program and an asset say about the operations between them, as read without a lock."""

    program_id: UUID
    program_status: str
    asset_id: UUID
    asset_status: str
    inventory_mode: str
    issuance_policy: str
    scale: int
    max_transaction_amount: Decimal | None
    is_linked: bool

    @property
    def has_lots(self) -> bool:
        """Whether credits of this asset make lots."""
        return self.inventory_mode == "LOT"

    @property
    def is_prefunded(self) -> bool:
        """Whether credits of this asset come out of the program's wallet."""
        return self.issuance_policy == "PREFUNDED"

    def amount(self, text: str, field: str = "amount") -> Decimal:
        """The positive amount of this asset in `text`. Raises Refusal `bad_request` or `invalid_scale`."""
        return parse_amount(text, self.scale, field)

    def print(self, amount: Decimal) -> str:
        """`amount` as responses show amounts of this asset."""
        return format_amount(amount, self.scale)


async def read_terms(tx: Transaction, program_id: UUID, asset_id: UUID) -> Terms:
    """The terms between this program and this asset. Raises Refusal `not_found` when either is unknown."""
    row = await tx.row(_READ, {"organization_id": tx.organization_id, "program_id": program_id, "asset_id": asset_id})
    assert row is not None, "the values list has one row"
    if row["program_status"] is None:
        raise not_found("program")
    if row["asset_status"] is None:
        raise not_found("asset")
    return Terms(program_id=program_id, asset_id=asset_id, **row)


def require_participant(participant: Mapping[str, Any] | None, *, needs_active: bool) -> None:
    """Refuse a participant that doesn't exist (`not_found`) or, with `needs_active`, isn't (`participant_inactive`)."""
    if participant is None:
        raise not_found("participant")
    if needs_active and participant["status"] != "ACTIVE":
        raise Refusal("participant_inactive", f"participant is {participant['status']}")


def require_program(terms: Terms, allowed: Collection[str] = ("ACTIVE",)) -> None:
    """Refuse a program whose status is none of `allowed`. Raises Refusal `program_inactive`."""
    if terms.program_status not in allowed:
        raise Refusal("program_inactive", f"program is {terms.program_status}")


def require_usable_asset(terms: Terms) -> None:
    """Refuse an asset that isn't linked to the program (`asset_not_linked`) or is archived (`asset_archived`)."""
    require_linked_asset(terms)
    if terms.asset_status == "ARCHIVED":
        raise Refusal("asset_archived", "asset is ARCHIVED")


def require_linked_asset(terms: Terms) -> None:
    """Refuse an asset that isn't linked to the program. Raises Refusal `asset_not_linked`."""
    if not terms.is_linked:
        raise Refusal("asset_not_linked", "asset is not linked to the program")


def require_within_cap(terms: Terms, amount: Decimal, field: str = "amount") -> None:
    """Refuse an amount above the asset's ceiling (`max_transaction_amount_exceeded`); equal is allowed."""
    ceiling = terms.max_transaction_amount
    if ceiling is None or amount <= ceiling:
        return
    message = f"{field} is above the asset's max_transaction_amount of {terms.print(ceiling)}"
    problem = Problem(field, message, expected=f"at most {terms.print(ceiling)}", received=terms.print(amount))
    raise Refusal("max_transaction_amount_exceeded", message, [problem])
