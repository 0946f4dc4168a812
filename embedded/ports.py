"""Which TCP ports the servers of the embedded mode listen on."""

import errno
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from embedded.problems import USAGE_EXIT_STATUS, StartupProblem

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class PortRequest:
    """A port somebody asked for: `option` is the command-line option that sets it, 0 means any free one."""

    option: str
    port: int
    host: str = LOOPBACK


def pick_ports(requests: Sequence[PortRequest]) -> list[int]:
    """Return a free port for each request, all of them different.

    Raises StartupProblem (exit status 2) naming the option when a port that was asked for cannot be had.
    """
    with ExitStack() as held:
        # All sockets stay open until the last one is bound, so that no port is given out twice.
        return [_bind(request, held) for request in requests]


def _bind(request: PortRequest, held: ExitStack) -> int:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            request.host, request.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = held.enter_context(socket.socket(family, kind, protocol))
        # Without this a port that was closed a moment ago counts as taken.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return int(listener.getsockname()[1])
    except (OSError, OverflowError) as error:
        raise StartupProblem(_explain(request, error), exit_status=USAGE_EXIT_STATUS) from error


def _explain(request: PortRequest, error: OSError | OverflowError) -> str:
    where = f"{request.host}:{request.port}"
    choose = f"Choose another port with {request.option} (0 picks a free one)."
    if isinstance(error, socket.gaierror):
        return f"The address {request.host} cannot be used ({error.strerror}). Choose another with --host."
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return f"Port {where} is already in use. {choose}"
    if isinstance(error, OSError) and error.errno == errno.EADDRNOTAVAIL:
        return f"This machine has no address {request.host}. Choose another with --host."
    return f"Cannot listen on {where} ({error}). {choose}"
