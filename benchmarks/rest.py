"""The few API calls that prepare a run and check what came of it; nothing here is measured."""

from typing import Any

import httpx

from benchmarks.load import Endpoint


class Rest:
    """A plain client of the public API. Every method raises httpx.HTTPStatusError on an error answer."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._client = httpx.Client(
            base_url=f"http://{endpoint.host}:{endpoint.port}",
            headers={"Authorization": f"Bearer {endpoint.key}"},
            timeout=30,
        )

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON object that a POST answers."""
        return self._read(self._client.post(path, json=body))

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object that a GET answers."""
        return self._read(self._client.get(path))

    def entries_written(self) -> int:
        """How many journal entries the organization has: the sequence of the newest."""
        return int(self.get("/v1/reports/integrity?window=1")["head_sequence"])

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    @staticmethod
    def _read(response: httpx.Response) -> dict[str, Any]:
        if response.is_error:
            response.read()
            raise httpx.HTTPStatusError(
                f"{response.request.method} {response.request.url.path} answered {response.status_code}: "
                f"{response.text[:500]}",
                request=response.request,
                response=response,
            )
        answer: dict[str, Any] = response.json()
        return answer
