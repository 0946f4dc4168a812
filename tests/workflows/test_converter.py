"""Our converter writes what the SDK's pydantic converter writes, and reads it. docs/decisions/0009-cheap-runs.md."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from temporalio.contrib.pydantic import pydantic_data_converter

from domain.ids import new_id
from domain.two_step import CancelOrder, RedemptionState
from workflows.converter import DATA_CONVERTER

NOON = datetime(2026, 3, 1, 12, 0, 0, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "type_hint"),
    [
        (RedemptionState("PENDING", Decimal("0.10"), 3, Decimal(0), NOON), RedemptionState),
        (CancelOrder(organization_id=new_id(), redemption_id=new_id(), not_after=NOON, reason="é"), CancelOrder),
        (timedelta(microseconds=1), timedelta),
        ({"a": [1, None, "x"]}, None),
        (None, None),
        (b"\x00", bytes),
    ],
)
async def test_payloads_are_those_of_the_sdk(value: Any, type_hint: Any) -> None:
    (ours,), (theirs,) = await DATA_CONVERTER.encode([value]), await pydantic_data_converter.encode([value])

    assert ours == theirs
    hints = None if type_hint is None else [type_hint]
    assert (
        await DATA_CONVERTER.decode([ours], hints) == await pydantic_data_converter.decode([theirs], hints) == [value]
    )
