"""The public API as the demo uses it: JSON in, JSON out, and every error a sentence."""

import asyncio
import json
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self

import httpx

from demo.problems import DemoProblem

PAGE = 200
ATTEMPTS = 5
TIMEOUT_S = 30.0
OPEN_REQUESTS = 8


class ApiClient:
    """One key's view of a running Scrip; paths are relative to `/v1`. Use it as an async context manager.

    Every call raises DemoProblem when the system cannot be reached or refuses.
    """

    def __init__(self, api_url: str, api_key: str) -> None:
        self._url = api_url.rstrip("/").removesuffix("/v1")
        self._client = httpx.AsyncClient(
            base_url=f"{self._url}/v1",
            headers={"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"},
            timeout=TIMEOUT_S,
            limits=httpx.Limits(max_connections=OPEN_REQUESTS),
            # A proxy of the environment is for the internet, not for a system of one's own.
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.__aexit__(kind, error, trace)

    async def get(self, path: str, **query: str | int) -> dict[str, Any]:
        """The body of a GET."""
        return await self._call("GET", path, query, None)

    async def post(self, path: str, body: dict[str, Any] | str) -> dict[str, Any]:
        """The body that a POST of `body` answers; a text is sent as the JSON that it is."""
        return await self._call("POST", path, {}, body if isinstance(body, str) else json.dumps(body))

    async def items(self, path: str, **query: str | int) -> AsyncIterator[dict[str, Any]]:
        """Every item of a list, page by page."""
        async for page in self.pages(path, **query):
            for item in page:
                yield item

    async def pages(self, path: str, **query: str | int) -> AsyncIterator[list[dict[str, Any]]]:
        """A list, a page at a time."""
        cursor: dict[str, str | int] = {}
        while True:
            answer = await self.get(path, limit=PAGE, **query, **cursor)
            yield answer["data"]
            if not answer["pagination"]["has_more"]:
                return
            cursor = {"cursor": answer["pagination"]["next_cursor"]}

    async def _call(self, method: str, path: str, query: dict[str, str | int], content: str | None) -> dict[str, Any]:
        for _ in range(ATTEMPTS):
            response = await self._send(method, path, query, content)
            if response.status_code != httpx.codes.TOO_MANY_REQUESTS:
                return self._body(response)
            await asyncio.sleep(int(response.headers.get("Retry-After", "1")))
        raise DemoProblem(f"{self._url} keeps answering that there are too many requests. Try again later.")

    async def _send(self, method: str, path: str, query: dict[str, str | int], content: str | None) -> httpx.Response:
        try:
            return await self._client.request(method, path, params=query, content=content)
        except httpx.TimeoutException:
            raise DemoProblem(f"{self._url} did not answer within {TIMEOUT_S:.0f} seconds. {_AGAIN}") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise DemoProblem(f"Nothing answers at {self._url} ({reason}). {_START} {_AGAIN}") from None

    def _body(self, response: httpx.Response) -> dict[str, Any]:
        try:
            body = response.json()
        except ValueError:
            body = None
        if response.is_success and isinstance(body, dict):
            return body
        if not isinstance(body, dict) or "code" not in body:
            raise DemoProblem(f"What answers at {self._url} is not Scrip (status {response.status_code}).")
        if response.status_code == httpx.codes.UNAUTHORIZED:
            raise DemoProblem(f"{self._url} does not know this API key: it is wrong or revoked. {_KEYS}")
        raise DemoProblem(
            f"{self._url} refused {response.request.method} {response.request.url.path}: {body['code']}, "
            f"{body.get('message')} (request {body.get('request_id')})"
        )


_START = "Start Scrip with `make run`, or name another one with --api-url and --api-key."
_AGAIN = "You can run the demo again at any time: what was sent before is not done twice."
_KEYS = "`scrip keys list` shows the keys, `scrip keys create` makes one."
