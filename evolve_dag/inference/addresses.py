"""Addresses of endpoints and servers, as an experiment file names them."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from evolve_dag.errors import ModelError


def http_host(address: str) -> str | None:
    """The host of an http(s) address; None where it is no such address."""
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and parts.port != 0
    except ValueError:  # a bracket that is not closed, a port that is no number
        return None
    return parts.hostname or None if usable else None


def host_of(address: str, key: str) -> str:
    """:func:`http_host` of an address that stands under ``key`` in the experiment file.

    Raises:
        ModelError: it is no http(s) address.
    """
    host = http_host(address)
    if host is not None:
        return host
    shown = address.rpartition("@")[2].partition("?")[0]  # without what may be a password or a key
    raise ModelError(f"{key}: {shown} is no http address", "write e.g. http://127.0.0.1:8000/v1")


def public_name(address: str) -> str:
    """An address without user, password and query."""
    parts = urlsplit(address)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
    return f"{parts.scheme}://{host}{f':{parts.port}' if parts.port else ''}{parts.path}"


def is_local(host: str) -> bool:
    """This machine, a private address, or a bare name as containers have it."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.endswith((".local", ".localhost", ".internal", ".svc"))
    return address.is_private or address.is_loopback
