"""Token buckets. Contract: basics.md 3 and the worked figures there."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import httpx
import pytest

from api.rate_limits import RateLimiter, TooManyRequests
from tests.api.calls import problem
from tests.conftest import SettableClock, Tenant

NOW = datetime(2030, 1, 1, tzinfo=UTC)
NOW_S = int(NOW.timestamp())
RATE, BURST = 10, 30


def figures(answer: httpx.Response) -> tuple[int, int, int]:
    limit, remaining, reset = (int(answer.headers[f"X-RateLimit-{name}"]) for name in ("Limit", "Remaining", "Reset"))
    return limit, remaining, reset - NOW_S


async def test_the_reference_profile_over_http(  # example 3
    new_organization: Callable[..., Tenant],
    client_for: Callable[[Tenant], httpx.AsyncClient],
    clock: SettableClock,
) -> None:
    clock.set(NOW)
    async with client_for(new_organization(RATE, BURST)) as client:
        first = await client.get("/programs")
        assert (first.status_code, figures(first)) == (200, (30, 29, 1))
        for _ in range(29):
            last = await client.get("/programs")
        assert (last.status_code, figures(last)) == (200, (30, 0, 3))

        refused = await client.get("/programs")
        problem(refused, 429, "too_many_requests")
        assert refused.headers["Retry-After"] == "1"
        assert figures(refused) == (30, 0, 3)
        assert "Retry-After" not in last.headers

        clock.advance(milliseconds=100)
        assert (await client.get("/programs")).status_code == 200
        assert (await client.get("/programs")).status_code == 429


async def test_all_keys_of_an_organization_share_its_bucket_and_no_other(
    new_organization: Callable[..., Tenant],
    client_for: Callable[[Tenant], httpx.AsyncClient],
    clock: SettableClock,
) -> None:
    clock.set(NOW)
    async with client_for(new_organization(1, 1)) as first, client_for(new_organization(1, 1)) as second:
        assert (await first.get("/programs")).status_code == 200
        assert (await first.get("/programs")).status_code == 429
        assert (await second.get("/programs")).status_code == 200


async def test_a_request_that_is_refused_for_another_reason_takes_its_token(
    new_organization: Callable[..., Tenant],
    client_for: Callable[[Tenant], httpx.AsyncClient],
    clock: SettableClock,
) -> None:
    clock.set(NOW)
    async with client_for(new_organization(1, 2)) as client:
        assert (await client.post("/programs", content=b"{")).status_code == 400
        assert (await client.get(f"/programs/{uuid4()}")).status_code == 404
        assert (await client.get("/programs")).status_code == 429


def test_a_bucket_refills_exactly_and_never_beyond_its_capacity() -> None:
    limiter = RateLimiter()
    for _ in range(BURST):
        status = limiter.take("a", RATE, BURST, NOW)
    assert (status.remaining, status.reset) == (0, NOW_S + 3)
    with pytest.raises(TooManyRequests):
        limiter.take("a", RATE, BURST, NOW + timedelta(microseconds=99_999))
    assert limiter.take("a", RATE, BURST, NOW + timedelta(microseconds=100_000)).remaining == 0
    assert limiter.status("a", RATE, BURST, NOW + timedelta(days=1)).remaining == BURST


def test_a_rate_that_does_not_divide_a_second_loses_nothing() -> None:
    limiter = RateLimiter()
    for second in range(100):
        for _ in range(3):
            limiter.take("a", 3, 3, NOW + timedelta(seconds=second))
        with pytest.raises(TooManyRequests):
            limiter.take("a", 3, 3, NOW + timedelta(seconds=second, microseconds=333_333))


def test_the_wait_is_told_in_whole_seconds() -> None:
    limiter = RateLimiter()
    limiter.take("a", 1, 1, NOW)
    with pytest.raises(TooManyRequests) as refusal:
        limiter.take("a", 1, 1, NOW + timedelta(milliseconds=1))
    assert refusal.value.retry_after_s == 1
    slow = RateLimiter()
    slow.take("b", 1, 1, NOW)
    slow.status("b", 1, 1, NOW - timedelta(hours=1))
    with pytest.raises(TooManyRequests):
        slow.take("b", 1, 1, NOW - timedelta(hours=1))


def test_a_changed_limit_counts_from_the_next_request_on() -> None:
    limiter = RateLimiter()
    for _ in range(10):
        limiter.take("a", 1, 10, NOW)
    assert limiter.take("a", 1, 20, NOW).remaining == 9
    with pytest.raises(TooManyRequests) as refusal:
        limiter.take("a", 1, 5, NOW)
    assert refusal.value.retry_after_s == 7


def test_the_number_of_buckets_is_bounded() -> None:
    limiter = RateLimiter()
    for number in range(10_050):
        limiter.take(f"10.0.{number}", 1, 1, NOW)
    assert limiter.status("10.0.0", 1, 1, NOW).remaining == 1
    assert limiter.status("10.0.10049", 1, 1, NOW).remaining == 0
