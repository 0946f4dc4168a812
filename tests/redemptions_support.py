"""Redemptions for tests: every operation in a transaction of its own, and what can be seen of it."""

from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import delete, update
from sqlmodel import col

from db.session import Database
from db.tables import Asset, Participant, Program, ProgramAsset, Reward
from domain import redemptions
from domain.balances import Holder
from domain.errors import Refusal
from domain.ids import new_id
from domain.money import format_plain
from domain.pagination import PageRequest
from domain.redemptions import (
    ConfirmRequest,
    Created,
    Redemption,
    RedemptionFilter,
    RedemptionRequest,
    Reversed,
    ReverseRequest,
)
from tests.builders import Shop, d, make_participant
from tests.holdings_support import Desk


def refused(code: str) -> Any:
    """Expects a Refusal with this code."""
    return pytest.raises(Refusal, check=lambda refusal: refusal.code == code)


def plain(amount: Any) -> str:
    """An amount without trailing zeros."""
    return format_plain(amount)


@dataclass(frozen=True)
class Till:
    """Where the holder of a desk redeems."""

    desk: Desk

    @staticmethod
    def of(database: Database, organization_id: UUID, shop: Shop) -> "Till":
        """Alice's."""
        return Till(Desk.of(database, organization_id, shop))

    def using(self, **change: Any) -> "Till":
        """The same for another program, asset or holder."""
        return replace(self, desk=self.desk.using(**change))

    def request(self, amount: str | None = None, **fields: Any) -> RedemptionRequest:
        """A request of an amount, or of an item where `reward_id` is among the fields."""
        plain: dict[str, Any] = {"participant_id": self.desk.holder.id, "program_id": self.desk.program_id}
        if "reward_id" not in fields:
            plain |= {"asset_id": self.desk.asset_id, "description": "Cash-out"}
        return RedemptionRequest(**{**plain, "amount": amount, **fields})

    async def try_redeem(self, amount: str | None = None, **fields: Any) -> Created | None:
        async with self._transaction() as tx:
            return await redemptions.create(tx, self.request(amount, **fields))

    async def redeem(self, amount: str | None = None, **fields: Any) -> Created:
        created = await self.try_redeem(amount, **fields)
        assert created is not None, "it takes two steps"
        return created

    async def reserve(self, amount: str | None = None, *, redemption_id: UUID | None = None, **fields: Any) -> Created:
        fields = {"requires_confirmation": True, **fields}
        async with self._transaction() as tx:
            return await redemptions.reserve(tx, self.request(amount, **fields), redemption_id or new_id())

    async def consider(self, amount: str | None = None, **fields: Any) -> Redemption | None:
        async with self._transaction() as tx:
            return await redemptions.consider_reservation(tx, self.request(amount, **fields))

    async def confirm(self, redemption_id: UUID, amount: str | None = None, **fields: Any) -> Redemption:
        async with self._transaction() as tx:
            return await redemptions.confirm(tx, redemption_id, ConfirmRequest(amount=amount, **fields))

    async def cancel(self, redemption_id: UUID, reason: str = "out of stock") -> Redemption:
        async with self._transaction() as tx:
            return await redemptions.cancel(tx, redemption_id, reason)

    async def expire(
        self, redemption_id: UUID, *, at: datetime | None = None, at_once: bool = False
    ) -> Redemption | None:
        async with self._transaction() as tx:
            return await redemptions.expire(tx, redemption_id, at=at, at_once=at_once)

    async def expire_due(self) -> int:
        async with self._transaction() as tx:
            return await redemptions.expire_due(tx, self.desk.holder.id)

    async def reverse(self, redemption_id: UUID, amount: str | None = None, **fields: Any) -> Reversed:
        request = ReverseRequest(amount=amount, **{"reason": "returned", **fields})
        async with self._transaction() as tx:
            return await redemptions.reverse(tx, redemption_id, request)

    async def get(self, redemption_id: UUID) -> Redemption:
        async with self._transaction() as tx:
            return await redemptions.get(tx, redemption_id)

    async def listed(self, **wanted: Any) -> list[Redemption]:
        async with self._transaction() as tx:
            page = await redemptions.find_page(tx, self.desk.holder.id, RedemptionFilter(**wanted), PageRequest())
        return page.items

    # --- what surrounds it ---

    def desk_of(self, kind: Any, entity_id: UUID) -> Desk:
        """The desk of another holder, or of a program's wallet."""
        return self.desk.using(holder=Holder(kind, entity_id))

    async def new_participant(self) -> UUID:
        async with self._transaction() as tx:
            return await make_participant(tx)

    async def set_status(self, status: str) -> None:
        """Change the participant's status."""
        await self._change(update(Participant).where(col(Participant.id) == self.desk.holder.id).values(status=status))

    async def change_asset(self, **columns: Any) -> None:
        """Change the asset behind everybody's back."""
        await self._change(update(Asset).where(col(Asset.id) == self.desk.asset_id).values(**columns))

    async def unlink_asset(self) -> None:
        await self._change(delete(ProgramAsset).where(col(ProgramAsset.asset_id) == self.desk.asset_id))

    async def link_asset(self) -> None:
        async with self._transaction() as tx:
            link = ProgramAsset(
                organization_id=tx.organization_id,
                program_id=self.desk.program_id,
                asset_id=self.desk.asset_id,
                created_at=tx.now,
            )
            await tx.insert(link)

    async def reward(self, **fields: Any) -> UUID:
        """An ACTIVE UNIT_BASED reward of 10 a unit; `fields` overrides columns."""
        reward_id = new_id()
        async with self._transaction() as tx:
            columns: dict[str, Any] = {
                "organization_id": tx.organization_id,
                "id": reward_id,
                "program_id": self.desk.program_id,
                "name": f"Mug {reward_id.hex[-12:]}",
                "redemption_type": "UNIT_BASED",
                "asset_id": self.desk.asset_id,
                "unit_cost": d("10"),
                "status": "ACTIVE",
                "redeemed_count": 0,
                "created_at": tx.now,
                "updated_at": tx.now,
                **fields,
            }
            await tx.insert(Reward(**columns))
        return reward_id

    async def change_reward(self, reward_id: UUID, **columns: Any) -> None:
        """Change a reward behind everybody's back."""
        await self._change(update(Reward).where(col(Reward.id) == reward_id).values(**columns))

    async def change_program(self, **columns: Any) -> None:
        """Change the program's settings."""
        await self._change(update(Program).where(col(Program.id) == self.desk.program_id).values(**columns))

    async def aim_at(self, entity_id: UUID) -> None:
        """Let the program's redemptions go to this ledger entity."""
        await self.change_program(redemption_target_type="LEDGER_ENTITY", redemption_target_entity_id=entity_id)

    async def stock(self, reward_id: UUID) -> tuple[str, int, int]:
        """A reward's status and count, and how many units the holder has had of it."""
        async with self._transaction() as tx:
            row = await tx.row(
                "select r.status, r.redeemed_count, coalesce(u.quantity, 0) as own from reward r"
                " left join reward_usage u on u.organization_id = r.organization_id and u.reward_id = r.id"
                " and u.participant_id = %s where r.organization_id = %s and r.id = %s",
                (self.desk.holder.id, tx.organization_id, reward_id),
            )
        assert row is not None
        return row["status"], row["redeemed_count"], row["own"]

    async def taken(self, redemption_id: UUID) -> list[tuple[UUID, str, str]]:
        """What it took of which lot, in order, and what has been given back."""
        async with self._transaction() as tx:
            rows = await tx.rows(
                "select lot_id, amount, refilled from redemption_lot"
                " where organization_id = %s and redemption_id = %s order by ordinal",
                (tx.organization_id, redemption_id),
            )
        return [(row["lot_id"], format_plain(row["amount"]), format_plain(row["refilled"])) for row in rows]

    async def _change(self, statement: Any) -> None:
        async with self._transaction() as tx:
            assert await tx.run(statement) == 1

    def _transaction(self) -> Any:
        return self.desk.database.transaction(self.desk.organization_id)
