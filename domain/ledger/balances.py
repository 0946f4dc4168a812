"""What holders have, derived from the newest posting of each of their accounts. Contract: holders.md 6.1."""

from collections.abc import Collection
from dataclasses import dataclass
from decimal import Decimal
from uuid import UUID

from db.session import Transaction
from domain.money import format_amount

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


async def holder_balances(
    tx: Transaction, entity_ids: Collection[UUID], asset_id: UUID | None = None
) -> list[AssetBalance]:
    """The balances of these holders, by holder and symbol; assets that a holder never touched are absent."""
    params = {"organization_id": tx.organization_id, "entity_ids": list(entity_ids), "asset_id": asset_id}
    return [AssetBalance(**row) for row in await tx.rows(_BALANCES, params)]
