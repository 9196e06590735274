"""Ports on which programs that tests start can listen, and what clients of them need."""

import random
import socket
import ssl
from pathlib import Path

EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For clients that need no certificates: where a variable names a file of them, each takes 20 ms to read it."""


def free_port() -> int:
    """Return a port that nobody has, and that the system gives to no client before a program has opened it.

    The system's own choice may be another program's a moment later.  A member of a Redis cluster takes the port 10,000
    above its own, too, which is below those that the system gives as well.
    """
    first = int(EPHEMERAL.read_text().split()[0]) if EPHEMERAL.exists() else 32_768
    choice = random.SystemRandom()
    while True:
        port = choice.randrange(10_000, max(first - 10_000, 11_000))
        with socket.socket() as probe:
            # As every server here does: what is left of a connection that has ended keeps no port from one.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
