"""A client as the documentation asks for: what was not answered is sent again, with the same idempotency keys."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx

from drills.case import Broken
from drills.platform import Platform

ANSWER_LIMIT_S = 20.0
GIVE_UP_S = 180.0
PAUSE_S = 0.2


class Client:
    """The public API. Counts how often it had to send again, and how often it was told 503."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self.calls = 0
        self.lost = 0
        self.unavailable = 0

    async def post(self, path: str, body: Any) -> dict[str, Any]:
        """The answer to a POST, sent again while the API is out of reach or answers 503.

        Raises Broken for any other answer than a success, and after three minutes.
        """
        deadline = time.monotonic() + GIVE_UP_S
        while True:
            answer = await self._try(path, body)
            if answer is not None:
                return answer
            if time.monotonic() > deadline:
                raise Broken(f"POST {path} was not answered within {GIVE_UP_S:.0f} s")
            await asyncio.sleep(PAUSE_S)

    async def post_once(self, path: str, body: Any) -> dict[str, Any]:
        """The answer to a POST that must succeed at once. Raises Broken."""
        answer = await self._try(path, body)
        if answer is None:
            raise Broken(f"POST {path} was refused with 503 or not answered, with nothing taken away")
        return answer

    async def get(self, path: str) -> dict[str, Any]:
        """The answer to a GET. Raises Broken."""
        return _success(await self._http.get(path))

    async def _try(self, path: str, body: Any) -> dict[str, Any] | None:
        self.calls += 1
        try:
            answer = await self._http.post(path, json=body)
        except httpx.TransportError:
            self.lost += 1
            return None
        if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:
            self.unavailable += 1
            return None
        return _success(answer)


@asynccontextmanager
async def client_of(platform: Platform) -> AsyncIterator[Client]:
    """A client with the platform's API key."""
    async with httpx.AsyncClient(
        base_url=platform.api_url,
        headers={"Authorization": f"Bearer {platform.api_key}"},
        timeout=ANSWER_LIMIT_S,
        limits=httpx.Limits(max_connections=64),
        trust_env=False,
    ) as http:
        yield Client(http)


def _success(answer: httpx.Response) -> dict[str, Any]:
    if not answer.is_success:
        raise Broken(f"{answer.request.method} {answer.request.url.path} answered {answer.status_code}: {answer.text}")
    body: dict[str, Any] = answer.json()
    return body
