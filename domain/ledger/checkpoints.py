"""What system accounts hold: checkpoints, and the postings after the newest one. Contract: holders.md 8.1.

System accounts carry no running balance, as that would serialize everybody who issues, redeems or expires value. Their
balance is a sum; checkpoints keep it short. A checkpoint at sequence S holds the sum of an account's postings in the
entries up to S. One pass takes the entries of a span and writes a checkpoint for every account that they touch, so an
account without one at the organization's newest sequence hasn't changed since its own newest. A full span that touches
none leaves a checkpoint with an unchanged balance, so that the next pass goes on after it.

Entries are numbered under the chain head's lock, which lasts until their commit: whoever reads the head and then the
entries up to it misses none of them.
"""

from collections.abc import Collection
from dataclasses import dataclass
from decimal import Decimal
from uuid import UUID

from db.session import Transaction
from domain import limits
from domain.money import ZERO, add

# The newest checkpoint of each system account, one probe of the primary key per account.
_NEWEST = """
select a.id, c.sequence, c.balance from account a
cross join lateral (
    select sequence, balance from system_checkpoint
    where organization_id = a.organization_id and account_id = a.id
    order by sequence desc limit 1
) c
where a.organization_id = %s and a.entity_id is null
"""

# Entry by entry through the chain, then posting by posting through its primary key: `offset 0` keeps the planner from
# reading an account's whole history instead, which is what a checkpoint is there to avoid.
_SUMS = """
select p.account_id, sum(p.amount)
from (select id from journal_entry
      where organization_id = %(organization_id)s and sequence > %(after)s and sequence <= %(until)s
      order by sequence offset 0) e
cross join lateral (
    select account_id, amount from posting
    where organization_id = %(organization_id)s and entry_id = e.id and version is null
    offset 0
) p
where %(account_id)s::uuid is null or p.account_id = %(account_id)s
group by p.account_id
"""

_INSERT = """
insert into system_checkpoint (organization_id, account_id, sequence, balance, created_at)
values (%s, %s, %s, %s, %s) on conflict do nothing
"""


@dataclass(frozen=True, slots=True)
class Checkpointed:
    """What a pass did: `until` is the sequence that the newest checkpoints reach, `more` that the head is far off."""

    written: int
    until: int
    more: bool


async def system_balance(tx: Transaction, account_id: UUID) -> Decimal:
    """The balance of a system account: its newest checkpoint and the postings of the entries after the last pass."""
    known = await _newest(tx)
    _, balance = known.get(account_id, (0, ZERO))
    sums = await _sums(tx, _reached(known), await _head(tx), account_id)
    return add(balance, sums.get(account_id, ZERO))


async def append_checkpoints(tx: Transaction, *, min_entries: int = limits.CHECKPOINT_ENTRIES) -> Checkpointed:
    """Append checkpoints for the next span of entries, if there are at least `min_entries` since the last pass.

    Passes that run at the same time write the same or both are true.
    """
    known = await _newest(tx)
    after, head = _reached(known), await _head(tx)
    if head - after < min_entries:
        return Checkpointed(0, after, False)
    until = min(head, after + limits.CHECKPOINT_SPAN)
    sums = await _sums(tx, after, until, None)
    if not sums and until - after == limits.CHECKPOINT_SPAN:
        sums = await _nothing_changed(tx, known)
    for account_id, change in sums.items():
        _, balance = known.get(account_id, (0, ZERO))
        await tx.execute(_INSERT, (tx.organization_id, account_id, until, add(balance, change), tx.now))
    # A part of a span that touches no system account leaves no trace and is read again, together with the next.
    return Checkpointed(len(sums), until if sums else after, bool(sums) and head - until >= min_entries)


async def _nothing_changed(tx: Transaction, known: Collection[UUID]) -> dict[UUID, Decimal]:
    """The change, zero, of one system account: it stands for a span that touches none of them."""
    if known:
        return {min(known): ZERO}
    cursor = await tx.execute(
        "select id from account where organization_id = %s and entity_id is null order by id limit 1",
        (tx.organization_id,),
    )
    return {row[0]: ZERO for row in await cursor.fetchall()}


async def _newest(tx: Transaction) -> dict[UUID, tuple[int, Decimal]]:
    rows = await tx.execute(_NEWEST, (tx.organization_id,))
    return {account_id: (sequence, balance) for account_id, sequence, balance in await rows.fetchall()}


def _reached(known: dict[UUID, tuple[int, Decimal]]) -> int:
    return max((sequence for sequence, _ in known.values()), default=0)


async def _head(tx: Transaction) -> int:
    cursor = await tx.execute("select sequence from chain_head where organization_id = %s", (tx.organization_id,))
    row = await cursor.fetchone()
    return 0 if row is None else int(row[0])


async def _sums(tx: Transaction, after: int, until: int, account_id: UUID | None) -> dict[UUID, Decimal]:
    params = {"organization_id": tx.organization_id, "after": after, "until": until, "account_id": account_id}
    return dict(await (await tx.execute(_SUMS, params)).fetchall())
