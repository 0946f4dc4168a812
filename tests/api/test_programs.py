"""Programs over HTTP. Contract: basics.md 5 and the examples of section 8."""

import httpx


async def test_a_program_needs_only_a_name(client: httpx.AsyncClient) -> None:  # example 6
    created = await client.post("/programs", json={"name": "Customer Loyalty"})

    assert created.status_code == 201
    program = created.json()
    assert program["status"] == "ACTIVE"
    assert program["on_unknown_participant"] == "CREATE"
    assert program["redemption_target_type"] == "SYSTEM_REDEMPTION"
    assert "redemption_target_entity_id" not in program
