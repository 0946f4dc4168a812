"""What holds for every request: keys, ids, errors, bodies, outages. Contract: basics.md 2 and 3, README.md."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest
from fastapi import FastAPI

from api import health
from api.app import create_app
from api.route import Tx, make_router
from db.session import ATTEMPTS, Database, OutcomeUnknown
from domain import limits
from domain.clock import system_clock
from settings import Settings
from tests.api.calls import all_pages, new_program, problem, wrong_fields
from tests.conftest import Tenant
from tests.servers import Postgres
from workflows.gateway import Gateway


@pytest.fixture
async def anonymous(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client without a key; its paths begin at the root."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://scrip.test") as client:
        yield client


# --- Keys --------------------------------------------------------------------------------------------------------


async def test_a_request_without_a_key_is_unauthorized(anonymous: httpx.AsyncClient) -> None:  # example 1
    body = problem(await anonymous.get("/v1/programs"), 401, "unauthorized")
    assert body["message"] == "invalid or revoked API key"
    assert "details" not in body


async def test_either_header_carries_the_key(anonymous: httpx.AsyncClient, organization: Tenant) -> None:  # example 2
    for headers in (
        {"X-API-Key": organization.api_key},
        {"Authorization": f"Bearer {organization.api_key}"},
        {"Authorization": f"bearer {organization.api_key}"},
    ):
        assert (await anonymous.get("/v1/programs", headers=headers)).status_code == 200


async def test_authorization_wins_over_the_other_header(anonymous: httpx.AsyncClient, organization: Tenant) -> None:
    for wrong in ("Bearer sk_wrong", "Basic abc", ""):
        headers = {"Authorization": wrong, "X-API-Key": organization.api_key}
        problem(await anonymous.get("/v1/programs", headers=headers), 401, "unauthorized")
    headers = {"Authorization": f"Bearer {organization.api_key}", "X-API-Key": "sk_wrong"}
    assert (await anonymous.get("/v1/programs", headers=headers)).status_code == 200


@pytest.mark.parametrize("key", ["sk_", "sk_unknown", "unknown", "sk_" + "x" * 10_000, "sk_\x00", "sk_é"])
async def test_a_wrong_key_is_unauthorized_whatever_it_looks_like(anonymous: httpx.AsyncClient, key: str) -> None:
    headers = {"X-API-Key": key.encode()}
    problem(await anonymous.get("/v1/programs", headers=headers), 401, "unauthorized")  # type: ignore[arg-type]


async def test_a_revoked_key_is_refused_from_the_next_request_on(
    client: httpx.AsyncClient, organization: Tenant, owner: psycopg.Connection[Any]
) -> None:
    assert (await client.get("/programs")).status_code == 200
    owner.execute("update api_key set revoked_at = now() where id = %s", (organization.api_key_id,))
    revoked = problem(await client.get("/programs"), 401, "unauthorized")
    assert revoked["message"] == "invalid or revoked API key"


async def test_an_unauthorized_body_is_not_looked_at(anonymous: httpx.AsyncClient) -> None:
    problem(await anonymous.post("/v1/programs", content=b"{", headers={"X-API-Key": "sk_x"}), 401, "unauthorized")


# --- Ids, headers, routes ----------------------------------------------------------------------------------------


async def test_every_response_carries_its_id_and_the_rate_headers(
    client: httpx.AsyncClient, anonymous: httpx.AsyncClient
) -> None:
    answers = [
        await client.get("/programs"),
        await client.get(f"/programs/{uuid4()}"),
        await client.post("/programs", content=b"{"),
        await client.get("/nowhere"),
        await client.put("/programs"),
        await client.post("/programs", content=b"x" * (limits.BODY_BYTES + 1)),
        await anonymous.get("/v1/programs"),
        await anonymous.get("/healthz"),
        await anonymous.get("/openapi.json"),
    ]
    assert [answer.status_code for answer in answers] == [200, 404, 400, 404, 405, 413, 401, 200, 200]
    for answer in answers:
        assert answer.headers["X-Request-Id"].startswith("req_")
        for name in ("Limit", "Remaining", "Reset"):
            assert int(answer.headers[f"X-RateLimit-{name}"]) >= 0
    assert len({answer.headers["X-Request-Id"] for answer in answers}) == len(answers)


async def test_an_unknown_route_and_a_wrong_method_are_told_apart(client: httpx.AsyncClient) -> None:
    problem(await client.get("/nowhere"), 404, "not_found")
    problem(await client.get("/programs/"), 404, "not_found")
    problem(await client.delete("/programs"), 405, "bad_request")


async def test_an_id_that_is_no_uuid_is_a_bad_request(client: httpx.AsyncClient) -> None:
    answer = await client.get("/programs/first")
    assert wrong_fields(answer) == {"id": "invalid"}
    assert answer.json()["details"]["expected"] == "uuid"
    assert answer.json()["details"]["received"] == "first"


async def test_the_documentation_describes_everything(anonymous: httpx.AsyncClient) -> None:
    schema = (await anonymous.get("/openapi.json")).json()
    assert set(schema["components"]["securitySchemes"]) == {"bearer", "header"}
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            assert operation["description"], (method, path)
            if path.startswith("/v1/"):
                assert operation["security"], (method, path)
                assert {"400", "401", "404", "429", "500", "503"} <= set(operation["responses"]), (method, path)
    assert (await anonymous.get("/docs")).status_code == 200


async def test_the_documentation_needs_nothing_from_elsewhere(anonymous: httpx.AsyncClient) -> None:
    page = (await anonymous.get("/docs")).text

    assets = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(assets) >= 3
    assert all(asset.startswith("/") for asset in assets), assets
    for asset in assets:
        assert (await anonymous.get(asset)).status_code == 200


async def test_probes_need_no_key(anonymous: httpx.AsyncClient) -> None:
    assert (await anonymous.get("/healthz")).json() == {"status": "ok"}
    ready = await anonymous.get("/readyz")
    assert ready.status_code == 200
    shown = ready.json()
    assert shown.pop("ledger")["status"] in ("ok", "invalid"), "other tests tamper with ledgers of this database"
    assert shown == {"status": "ready", "database": "ok", "temporal": "unreachable"}


# --- Bodies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", "body"),
        (b"{", "body"),
        (b"[]", "body"),
        (b"null", "body"),
        (b'"name"', "body"),
        (b"\xff\xfe", "body"),
        (b'{"name":"x"} {}', "body"),
        (b'{"name":NaN}', "name"),
        (b'{"name":"x","on_unknown_participant":-Infinity}', "on_unknown_participant"),
        (b'{"name":"x","y":1e999}', "y"),
        (b'{"name":"x","y":' + b"1" * 41 + b"}", "y"),
        (b'{"name":"x","name":"y"}', "name"),
        (b'{"name":"x","y":{"z":1,"z":2}}', "y.z"),
        (b'{"name":"a\\u0000b"}', "name"),
        (b'{"name":"x","y":["\\ud800"]}', "y[0]"),
        (b'{"name":"x","y":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "body"),
        (b'{"name":["x"]}', "name"),
        (b'{"name":true}', "name"),
        (b'{"name":null}', "name"),
        (b'{"name":12345678901234567890}', "name"),
    ],
)
async def test_a_body_that_cannot_be_taken_is_refused_by_field(
    client: httpx.AsyncClient, body: bytes, field: str
) -> None:
    assert list(wrong_fields(await client.post("/programs", content=body))) == [field]
    assert await all_pages(client, "/programs") == []


async def test_what_was_received_is_shown_but_never_at_length(client: httpx.AsyncClient) -> None:
    answer = await client.post("/programs", json={"name": "x" * 100_000})
    assert answer.json()["details"]["received"] == "x" * 100
    assert len(answer.content) < 2_000
    nested = await client.post("/programs", json={"name": {"secret": "s3cret"}})
    assert "s3cret" not in nested.text


async def test_all_problems_are_listed_up_to_a_limit(client: httpx.AsyncClient) -> None:
    answer = await client.post("/participants", json={"external_id": "x", "tags": [5] * 10_000})
    assert len(wrong_fields(answer)) == 50


async def test_unknown_members_and_content_types_do_not_matter(client: httpx.AsyncClient) -> None:
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "nonsense"):
        body = b'{"name":"x","unknown":{"deep":[1,2,3]}}'
        answer = await client.post("/programs", content=body, headers={"Content-Type": content_type})
        assert answer.status_code == 201
        assert "unknown" not in answer.json()


@pytest.mark.parametrize("size", [limits.BODY_BYTES + 1, 10 * 1024 * 1024])
async def test_a_body_above_8_mib_is_refused(client: httpx.AsyncClient, size: int) -> None:
    problem(await client.post("/programs", content=b" " * size), 413, "bad_request")


async def test_a_body_above_8_mib_is_refused_when_it_hides_its_length(client: httpx.AsyncClient) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b" " * 1024 * 1024

    problem(await client.post("/programs", content=chunks()), 413, "bad_request")


async def test_a_body_of_8_mib_is_read(client: httpx.AsyncClient) -> None:
    body = json.dumps({"name": "x"}).encode()
    assert (await client.post("/programs", content=body.ljust(limits.BODY_BYTES))).status_code == 201


@pytest.mark.parametrize("path", ["/programs?search=a%00b", "/participants?external_id=%00", "/events?status=%00"])
async def test_nul_characters_in_a_query_are_refused(client: httpx.AsyncClient, path: str) -> None:
    assert len(wrong_fields(await client.get(path))) == 1


async def test_nul_characters_in_a_path_are_refused(client: httpx.AsyncClient) -> None:
    program_id = (await new_program(client))["id"]
    assert wrong_fields(await client.put(f"/programs/{program_id}/state/tags/a%00b")) == {"tag": "invalid"}


@pytest.mark.parametrize(
    "timestamp",
    ["2024-01-15", "2024-01-15T10:30:00", "1705314600", "2024-02-30T00:00:00Z", "0001-01-01T00:00:00+14:00"],
)
async def test_a_timestamp_needs_a_time_and_an_offset(client: httpx.AsyncClient, timestamp: str) -> None:
    answer = await client.get("/participants", params={"from": timestamp})
    assert wrong_fields(answer) == {"from": "invalid"}
    assert answer.json()["details"]["expected"] == "timestamp"


async def test_a_timestamp_in_any_offset_and_precision_is_understood(client: httpx.AsyncClient) -> None:
    for timestamp in ("2024-01-15T10:30:00.123456789+02:00", "2024-01-15t10:30:00z"):
        assert (await client.get("/participants", params={"to": timestamp})).status_code == 200


# --- Transactions ------------------------------------------------------------------------------------------------


class Faulty:
    """An application with one more endpoint, whose behaviour a test sets."""

    def __init__(self, settings: Settings, database: Database, gateway: Gateway) -> None:
        self.app = create_app(settings, database, gateway=gateway)
        self.calls = 0
        self.behave: Callable[[int], None] = lambda call: None
        router = make_router("Test")

        @router.post("/fault")
        async def fault(tx: Tx) -> dict[str, int]:
            """Write something, then do what the test wants."""
            self.calls += 1
            await tx.execute(
                "insert into tag (organization_id, entity_id, tag, created_at) values (%s, %s, 'x', now())",
                (tx.organization_id, tx.organization_id),
            )
            self.behave(self.calls)
            return {"calls": self.calls}

        self.app.include_router(router)


@pytest.fixture
def faulty(settings: Settings, database: Database, gateway: Gateway) -> Faulty:
    return Faulty(settings, database, gateway)


@pytest.fixture
async def fault(faulty: Faulty, organization: Tenant, owner: psycopg.Connection[Any]) -> Callable[[], Any]:
    """Call the faulty endpoint; the answer, and how many rows it left."""

    async def call() -> tuple[httpx.Response, int]:
        transport = httpx.ASGITransport(faulty.app, raise_app_exceptions=False)
        headers = {"X-API-Key": organization.api_key}
        async with httpx.AsyncClient(transport=transport, base_url="http://scrip.test/v1", headers=headers) as client:
            answer = await client.post("/fault")
        found = owner.execute("select count(*) from tag where organization_id = %s", (organization.id,)).fetchone()
        assert found is not None
        return answer, found[0]

    return call


async def test_a_request_is_one_transaction_that_commits_by_itself(fault: Callable[[], Any]) -> None:
    answer, rows = await fault()
    assert (answer.status_code, rows) == (200, 1)


async def test_an_unexpected_error_is_a_500_that_tells_and_leaves_nothing(
    faulty: Faulty, fault: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    def behave(call: int) -> None:
        raise RuntimeError("password=hunter2")

    faulty.behave = behave
    answer, rows = await fault()
    body = problem(answer, 500, "internal_error")
    assert "hunter2" not in answer.text
    assert "X-RateLimit-Limit" in answer.headers
    assert rows == 0
    assert body["message"] == "an unexpected error occurred"


async def test_a_conflict_between_transactions_repeats_the_request(faulty: Faulty, fault: Callable[[], Any]) -> None:
    def behave(call: int) -> None:
        if call < 3:
            raise psycopg.errors.DeadlockDetected("deadlock")

    faulty.behave = behave
    answer, rows = await fault()
    assert (answer.status_code, answer.json(), rows) == (200, {"calls": 3}, 1)
    # It was one request, however often it was repeated.
    limit = int(answer.headers["X-RateLimit-Limit"])
    assert int(answer.headers["X-RateLimit-Remaining"]) == limit - 1


async def test_a_conflict_that_does_not_end_is_a_503(faulty: Faulty, fault: Callable[[], Any]) -> None:
    def behave(call: int) -> None:
        raise psycopg.errors.SerializationFailure("again")

    faulty.behave = behave
    answer, rows = await fault()
    problem(answer, 503, "service_unavailable")
    assert (faulty.calls, rows) == (ATTEMPTS, 0)


async def test_a_lock_that_is_not_had_in_time_is_a_503(faulty: Faulty, fault: Callable[[], Any]) -> None:
    def behave(call: int) -> None:
        raise psycopg.errors.LockNotAvailable("timeout")

    faulty.behave = behave
    answer, rows = await fault()
    problem(answer, 503, "service_unavailable")
    assert (faulty.calls, rows) == (1, 0)


async def test_a_commit_whose_outcome_is_unknown_is_a_503_that_says_so(
    faulty: Faulty, fault: Callable[[], Any]
) -> None:
    def behave(call: int) -> None:
        raise OutcomeUnknown("the connection was lost during the commit")

    faulty.behave = behave
    answer, _ = await fault()
    message = problem(answer, 503, "service_unavailable")["message"]
    assert "outcome is unknown" in message
    assert "same idempotency_key" in message
    assert "nothing was done" not in message
    assert faulty.calls == 1


async def test_a_busy_database_is_a_503_and_no_reason_to_be_taken_out_of_service(
    postgres: Postgres, settings: Settings, gateway: Gateway, organization: Tenant
) -> None:
    database = Database(postgres.app_url, size=1, timeout_s=0.05, clock=system_clock)
    await database.open()
    try:
        app = create_app(settings, database, gateway=gateway)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://scrip.test") as client:
            async with database.transaction(organization.id):
                answer = await client.get("/v1/programs", headers={"X-API-Key": organization.api_key})
                problem(answer, 503, "service_unavailable")
                ready = await client.get("/readyz")
                assert (ready.status_code, ready.json()["database"]) == (200, "busy")
            ready = await client.get("/readyz")
            assert (ready.status_code, ready.json()["database"]) == (200, "ok")
    finally:
        await database.close()


async def test_a_database_that_does_not_answer_keeps_no_probe_waiting(
    settings: Settings, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = asyncio.Event()

    async def say_nothing(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await over.wait()
        writer.close()

    monkeypatch.setattr(health, "_DATABASE_PROBE_S", 0.05)
    mute = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    port = mute.sockets[0].getsockname()[1]
    url = f"postgresql://scrip_app:x@127.0.0.1:{port}/scrip"
    database = Database(url, size=1, timeout_s=3_600, clock=lambda: pytest.fail("no transaction begins"))
    await database.open()
    try:
        app = create_app(settings, database, gateway=gateway)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://scrip.test") as client:
            ready = await client.get("/readyz")
        assert (ready.status_code, ready.json()["database"]) == (503, "unreachable")
    finally:
        mute.close()
        over.set()
        await database.close()


async def test_an_unreachable_database_is_a_503(settings: Settings, gateway: Gateway, organization: Tenant) -> None:
    url = "postgresql://scrip_app:x@127.0.0.1:1/scrip"
    database = Database(url, size=1, timeout_s=0.2, clock=lambda: pytest.fail("no transaction begins"))
    await database.open()
    try:
        app = create_app(settings, database, gateway=gateway)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://scrip.test") as client:
            answer = await client.get("/v1/programs", headers={"X-API-Key": organization.api_key})
            problem(answer, 503, "service_unavailable")
            assert (await client.get("/healthz")).status_code == 200
            ready = await client.get("/readyz")
            assert (ready.status_code, ready.json()["database"]) == (503, "unreachable")
    finally:
        await database.close()


async def test_a_slow_client_holds_no_connection(app: FastAPI, client: httpx.AsyncClient, organization: Tenant) -> None:
    """More bodies than the pool has connections are on their way at once, and others are still served."""
    gate = asyncio.Event()

    async def slow_body() -> AsyncIterator[bytes]:
        yield b'{"name":'
        await gate.wait()
        yield b'"slow"}'

    uploads = [asyncio.create_task(client.post("/programs", content=slow_body())) for _ in range(20)]
    await asyncio.sleep(0)
    assert (await client.get("/programs")).status_code == 200
    gate.set()
    assert {answer.status_code for answer in await asyncio.gather(*uploads)} == {201}
