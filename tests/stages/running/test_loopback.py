"""A company's proxy is never asked for 127.0.0.1."""

import urllib.request

import pytest

from stages.running.loopback import bypass_proxies_on_loopback


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "127.0.0.1,localhost,::1"),
        ("", "127.0.0.1,localhost,::1"),
        ("corp.example, localhost", "corp.example,localhost,127.0.0.1,::1"),
        ("*", "*"),
    ],
)
def test_loopback_is_added_to_what_the_user_named(monkeypatch, before, after):
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
        if before is not None:
            monkeypatch.setenv(variable, before)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    bypass_proxies_on_loopback()
    import os

    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == after
    assert urllib.request.proxy_bypass("127.0.0.1") and urllib.request.proxy_bypass("localhost")
    monkeypatch.undo()
