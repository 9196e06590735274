"""Examines the address that the service listens on, and the service itself where it runs there."""

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

from app.config import Settings
from app.doctor.findings import Finding, ok, problem, warning

SUBJECT = "network"
_WAIT_SECONDS = 2.0


def examine_network(settings: Settings) -> Iterator[Finding]:
    host, port = settings.app.host, settings.app.port
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        text = f"{host} is no address of this machine: {error.strerror}"
        yield problem(SUBJECT, text, "set app.host to 127.0.0.1 or 0.0.0.0")
        return
    reason = _bind(family, address)
    if reason is None:
        yield ok(SUBJECT, f"port {port} of {host} is free: no service runs there")
    elif (ready := _get(host, port, "/readyz")) is not None and "status" in ready:
        yield from _running(port, ready)
    else:
        advice = "end the program that uses it, or choose another: APP__PORT"
        yield problem(SUBJECT, f"port {port} of {host} cannot be used: {reason}", advice)


def _bind(family: int, address: Any) -> str | None:
    """Return why an address cannot be bound, None if it can."""
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            return error.strerror or type(error).__name__
    return None


def _running(port: int, ready: dict[str, Any]) -> Iterator[Finding]:
    if ready["status"] == "ready":
        yield ok("service", f"runs on port {port} and is ready")
    else:
        yield warning("service", f"runs on port {port} and is {ready['status']}", "wait, or read its log")
    if "database" in ready:
        yield problem("service", f"its database {ready['database']}", "see the lines on the database")


def _get(host: str, port: int, path: str) -> dict[str, Any] | None:
    """Return a JSON object that a server on this machine answers with, whatever the status; None without one."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        try:
            reply = opener.open(f"http://{reachable}:{port}{path}", timeout=_WAIT_SECONDS)
        except urllib.error.HTTPError as error:
            reply = error
        with reply:
            body = json.loads(reply.read(10_000))
    except (OSError, ValueError):
        return None
    return body if isinstance(body, dict) else None


def is_local(host: str | None) -> bool:
    """Return whether a host's name or address is this machine's own."""
    try:
        return not host or host == "localhost" or host.startswith("/") or ip_address(host).is_loopback
    except ValueError:
        return False
