"""What holders have, derived from the newest posting of each of their accounts. Contract: holders.md 6.1."""

from collections.abc import Collection
from dataclasses import dataclass
from decimal import Decimal
from itertools import groupby
from operator import itemgetter
from uuid import UUID

from db.session import Transaction
from domain.ledger import moments
from domain.ledger.moments import Mark, Moment, Position
from domain.money import add, format_amount

# The newest posting comes from the unique index on (organization_id, account_id, version desc), one probe per account.
_BALANCES = """
select a.entity_id, a.asset_id, s.symbol, s.scale,
       coalesce(sum(p.balance) filter (where a.bucket = 'AVAILABLE'), 0) as available,
       coalesce(sum(p.balance) filter (where a.bucket = 'HELD'), 0) as held,
       coalesce(sum(p.balance) filter (where a.bucket = 'DEFERRED'), 0) as deferred
from account a
cross join lateral (
    select balance from posting
    where organization_id = a.organization_id and account_id = a.id
    order by version desc limit 1
) p
join asset s on s.organization_id = a.organization_id and s.id = a.asset_id
where a.organization_id = %(organization_id)s and a.entity_id = any(%(entity_ids)s)
    and (%(asset_id)s::uuid is null or a.asset_id = %(asset_id)s)
group by a.entity_id, a.asset_id, s.symbol, s.scale
order by a.entity_id, lower(s.symbol)
"""

_ACCOUNTS = """
select a.id, a.asset_id, a.bucket, s.symbol, s.scale
from account a
join asset s on s.organization_id = a.organization_id and s.id = a.asset_id
where a.organization_id = %(organization_id)s and a.entity_id = %(entity_id)s
    and (%(asset_id)s::uuid is null or a.asset_id = %(asset_id)s)
order by lower(s.symbol)
"""

# An account doesn't know its programs: every posting of the holder is looked at, account by account, with its entry.
_PROGRAM_TOTALS = """
select a.asset_id, s.scale, sum(t.amount) as amount
from account a
cross join lateral (
    select sum(p.amount) as amount
    from posting p
    join journal_entry e on e.organization_id = p.organization_id and e.id = p.entry_id
    where p.organization_id = a.organization_id and p.account_id = a.id and e.program_id = %(program_id)s
        and (%(sequence)s::bigint is null or e.sequence <= %(sequence)s)
) t
join asset s on s.organization_id = a.organization_id and s.id = a.asset_id
where a.organization_id = %(organization_id)s and a.entity_id = %(entity_id)s and t.amount is not null
group by a.asset_id, s.scale, s.symbol
order by lower(s.symbol)
"""


@dataclass(frozen=True, slots=True)
class AssetBalance:
    """The three buckets of one asset of one holder."""

    entity_id: UUID
    asset_id: UUID
    symbol: str
    scale: int
    available: Decimal
    held: Decimal
    deferred: Decimal

    def print(self, amount: Decimal) -> str:
        """`amount` as responses show amounts of this asset."""
        return format_amount(amount, self.scale)

    @property
    def total(self) -> Decimal:
        """The three buckets together."""
        return add(add(self.available, self.held), self.deferred)


@dataclass(frozen=True, slots=True)
class AssetTotal:
    """What a holder has of one asset, all buckets together."""

    asset_id: UUID
    scale: int
    amount: Decimal

    @property
    def text(self) -> str:
        """The amount as responses show it."""
        return format_amount(self.amount, self.scale)


async def holder_balances(
    tx: Transaction, entity_ids: Collection[UUID], asset_id: UUID | None = None
) -> list[AssetBalance]:
    """The balances of these holders, by holder and symbol; assets that a holder never touched are absent."""
    params = {"organization_id": tx.organization_id, "entity_ids": list(entity_ids), "asset_id": asset_id}
    return [AssetBalance(**row) for row in await tx.rows(_BALANCES, params)]


async def holder_balances_at(
    tx: Transaction, entity_id: UUID, moment: Moment, asset_id: UUID | None = None
) -> list[AssetBalance]:
    """What `holder_balances` answered at `moment`: assets that the holder first touched later are absent."""
    params = {"organization_id": tx.organization_id, "entity_id": entity_id, "asset_id": asset_id}
    accounts = await tx.rows(_ACCOUNTS, params)
    marks = await moments.marks(tx, [account["id"] for account in accounts], [Position(moment.sequence)])
    balances = []
    for (asset, symbol, scale), group in groupby(accounts, key=itemgetter("asset_id", "symbol", "scale")):
        held = {account["bucket"]: marks[account["id"]][0] for account in group}
        if any(mark.version > 0 for mark in held.values()):
            buckets = (held.get(bucket, Mark()).balance for bucket in ("AVAILABLE", "HELD", "DEFERRED"))
            balances.append(AssetBalance(entity_id, asset, symbol, scale, *buckets))
    return balances


async def holder_totals(
    tx: Transaction, entity_id: UUID, program_id: UUID | None = None, moment: Moment | None = None
) -> list[AssetTotal]:
    """The holder's total of each asset it ever touched, by symbol; as they were at `moment`, or now without one.

    With `program_id` the sums of that program's entries alone, which may be negative: value that one program gave can
    be spent in another. Contract: holders.md 4.3.
    """
    if program_id is not None:
        params = {
            "organization_id": tx.organization_id,
            "entity_id": entity_id,
            "program_id": program_id,
            "sequence": None if moment is None else moment.sequence,
        }
        return [AssetTotal(**row) for row in await tx.rows(_PROGRAM_TOTALS, params)]
    if moment is None:
        found = await holder_balances(tx, [entity_id])
    else:
        found = await holder_balances_at(tx, entity_id, moment)
    return [AssetTotal(row.asset_id, row.scale, row.total) for row in found]
