"""Stages - one chat request to an OpenAI-compatible endpoint, answered from the cache if it was asked before. Standard library only.

    <store>/judgements/<2 hex>/<key>.json       request and reply; deleting the directory costs requests, nothing else

The key is the content of the request (model, messages, sampling, sample number), never the address: the same judge behind another port is
the same judge. Only replies with status 200 are kept, so what failed is asked again by the next try, and what succeeded never is.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from data_contracts.config import Runtime
from data_contracts.errors import ConfigError
from data_contracts.files import write_atomic
from data_contracts.identity import canonical_json, digest_text
from stages.scoring.served import Served

VERSION = "1"
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
LOST = ("judge cannot be reached", "judge's answer was damaged")
FATAL = {401: "refuses the key", 403: "forbids it", 404: "knows no such model or address", 405: "is no chat endpoint"}


class EndpointRuntime(Runtime):
    """Where the judge answers, and how hard it may be pressed."""

    base_url: str = "http://127.0.0.1:8000/v1"
    """Up to `/v1`: `vllm serve MODEL` or any other OpenAI-compatible server."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the key; not needed for a server of your own."""
    num_parallel: int = Field(16, ge=1)
    """Requests under way at once."""
    timeout_seconds: float = Field(120.0, gt=0)
    """Without a word from the server for so long, a request has failed."""
    retries: int = Field(3, ge=0)
    """Further tries of a request that timed out, or got one of 408, 429, 5xx."""
    backoff_seconds: float = Field(1.0, ge=0)
    """Wait before the first further try; doubled each time, at most 60 s. `Retry-After` is obeyed."""

    @field_validator("base_url")
    @classmethod
    def _an_address_and_nothing_secret(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be the address of an endpoint, e.g. http://127.0.0.1:8000/v1")
        if parts.username or parts.password:
            raise ValueError(
                "holds a user or password, and settings end in records: put the key into the variable named by api_key_env"
            )
        return url


class Reply(NamedTuple):
    body: dict[str, Any] | None
    """The chat completion; None: it failed."""
    failure: str
    """Why, in words that repeat from request to request; "" for none."""

    @property
    def text(self) -> str:
        try:
            content = self.body["choices"][0]["message"]["content"]
            return content if isinstance(content, str) else ""
        except (KeyError, IndexError, TypeError):
            return ""


class Endpoint:
    def __init__(self, runtime: EndpointRuntime, root: Path | None, server: Served | None = None):
        """`server`: answers instead of `base_url`; started by the first request that is not in the cache."""
        self.runtime, self.root, self.server = runtime, root, server
        self.counts: Counter[str] = Counter()
        self._address(runtime.base_url)

    def _address(self, base_url: str) -> None:
        self.url = base_url.rstrip("/") + "/chat/completions"
        # A server on this machine is never asked through a proxy.
        local = urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")
        self.opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))

    def ask(
        self, requests: Sequence[dict[str, Any]], answered: Callable[[int], None] = lambda count: None
    ) -> list[Reply]:
        """Each request's reply, in order; equal requests are asked once. `answered`: told about every few that are.

        Raises: ConfigError for what no further try would cure.
        """
        keys = [digest_text(canonical_json({"version": VERSION, **request})) for request in requests]
        wanted = dict(zip(keys, requests, strict=True))
        found = {key: reply for key in wanted if (reply := self._cached(key)) is not None}
        self.counts["cached"] += len(found)
        times = Counter(keys)
        answered(sum(times[key] for key in found))
        missing = [key for key in wanted if key not in found]
        if missing and self.server is not None:
            self._address(self.server.start())
        pool = ThreadPoolExecutor(self.runtime.num_parallel, thread_name_prefix="judge")
        try:
            for key, reply in zip(missing, pool.map(lambda key: self._fetch(key, wanted[key]), missing), strict=True):
                found[key] = reply
                answered(times[key])
                for name, count in ((reply.body or {}).get("usage") or {}).items():
                    self.counts[name] += count if isinstance(count, int) else 0  # what the reply says it cost
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        if self.server is not None and any(found[key].failure in LOST for key in missing):
            self.server.check(patience=5)
        return [found[key] for key in keys]

    def _path(self, key: str) -> Path:
        return self.root / "judgements" / key[:2] / f"{key[2:]}.json"

    def _cached(self, key: str) -> Reply | None:
        if self.root is None:
            return None
        try:
            return Reply(json.loads(self._path(key).read_text(encoding="utf-8"))["reply"], "")
        except (OSError, ValueError, KeyError):
            return None  # not there, or damaged: asked again

    def _fetch(self, key: str, request: dict[str, Any]) -> Reply:
        body = {name: value for name, value in request.items() if name != "sample"}
        failure, wait = "", self.runtime.backoff_seconds
        for attempt in range(self.runtime.retries + 1):
            if attempt:
                time.sleep(min(wait, 60.0))
                wait *= 2
            try:
                reply = self._post(body)
            except urllib.error.HTTPError as error:
                detail = error.read(500).decode(errors="replace").strip()
                if error.code in FATAL:
                    raise ConfigError(
                        f"the judge at {self.url} {FATAL[error.code]} ({error.code}): {detail[:300]}"
                    ) from None
                failure = f"judge answered {error.code}"
                if error.code not in RETRIED:
                    break
                after = error.headers.get("Retry-After", "")
                wait = max(wait, float(after)) if after.isdigit() else wait
            except TimeoutError:
                failure = "judge timed out"
            except urllib.error.URLError as error:
                failure = "judge timed out" if isinstance(error.reason, TimeoutError) else "judge cannot be reached"
            except (OSError, ValueError, HTTPException):  # cut off in mid-sentence, or no JSON
                failure = "judge's answer was damaged"
            else:
                self.counts["asked"] += 1
                if self.root is not None:
                    path = self._path(key)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_atomic(path, json.dumps({"request": request, "reply": reply}, ensure_ascii=False))
                return Reply(reply, "")
        self.counts["failed"] += 1
        return Reply(None, failure)

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        key = os.environ.get(self.runtime.api_key_env) or "none"
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        with self.opener.open(request, timeout=self.runtime.timeout_seconds) as response:
            data = json.loads(response.read())
        if not isinstance(data, dict) or not isinstance(data.get("choices"), list) or not data["choices"]:
            raise ValueError("no choices")
        return data
