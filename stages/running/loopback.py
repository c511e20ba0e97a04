"""Stages - loopback addresses bypass proxies: the run's own Prefect server, judges and engines on this machine."""

from __future__ import annotations

import os

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def bypass_proxies_on_loopback() -> None:
    """Name loopback in NO_PROXY of this process and its children. HTTP_PROXY stays in force for other addresses."""
    for variable in ("NO_PROXY", "no_proxy"):
        hosts = [host.strip() for host in os.environ.get(variable, "").split(",") if host.strip()]
        if "*" not in hosts:
            os.environ[variable] = ",".join(dict.fromkeys([*hosts, *LOOPBACK]))
