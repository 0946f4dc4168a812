"""Questions that tell whether a server serves."""

import http.client
from urllib.parse import urlsplit

PROBE_TIMEOUT_SECONDS = 2


def answers_ok(url: str) -> bool:
    """Whether a GET of the http `url` answers 200 within two seconds; proxies are never used."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=PROBE_TIMEOUT_SECONDS)
    try:
        connection.request("GET", parts.path)
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
