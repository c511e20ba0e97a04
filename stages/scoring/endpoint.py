"""Stages - chat requests to an OpenAI-compatible endpoint, with answers cached in the store. Standard library only.

    <store>/judgements/<2 hex>/<key>.json       request and reply; deleting the directory costs requests, nothing else

The key is the content of the request (model, messages, sampling, sample number), never the address: the same judge
behind another port is the same judge. Only replies with status 200 are kept: a request that failed is asked again by
the next try, one that succeeded never is.
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
"""Statuses that another try may cure."""
UNREACHABLE, DAMAGED, TIMED_OUT = "judge cannot be reached", "judge's answer was damaged", "judge timed out"
FATAL = {401: "refuses the key", 403: "forbids it", 404: "knows no such model or address", 405: "is no chat endpoint"}


class EndpointRuntime(Runtime):
    """Where the judge answers, and how many requests it gets at once."""

    base_url: str = "http://127.0.0.1:8000/v1"
    """Up to `/v1`: `vllm serve MODEL` or any other OpenAI-compatible server."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the key; not needed for a server of your own."""
    num_parallel: int = Field(16, ge=1)
    """Requests under way at once."""
    timeout_seconds: float = Field(120.0, gt=0)
    """A request fails if the server sends nothing for this long."""
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
                "holds a user or password, and settings end in records: put the key into the variable named by "
                "api_key_env"
            )
        return url


class Reply(NamedTuple):
    """What came of one request."""

    body: dict[str, Any] | None
    """The chat completion as JSON; None: the request failed."""
    failure: str
    """Why it failed, in words that repeat from request to request; "" if it did not."""

    @property
    def text(self) -> str:
        """The message of the first choice, "" if there is none."""
        try:
            content = (self.body or {})["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            return ""
        return content if isinstance(content, str) else ""


class Endpoint:
    """An endpoint with its cache. `counts`: requests asked, cached and failed, and what the replies' `usage` says of
    tokens."""

    def __init__(self, runtime: EndpointRuntime, root: Path | None, server: Served | None = None):
        """`root`: of the store that keeps replies, None: keep none. `server`: answers instead of `base_url`; the first
        request that is not in the cache starts it."""
        self.runtime, self.root, self.server = runtime, root, server
        self.counts: Counter[str] = Counter()
        self._use(runtime.base_url)

    def _use(self, base_url: str) -> None:
        """Send requests to this address."""
        self.url = base_url.rstrip("/") + "/chat/completions"
        # A server on this machine is never asked through a proxy.
        local = urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")
        self.opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))

    def ask(
        self, requests: Sequence[dict[str, Any]], answered: Callable[[int], None] = lambda count: None
    ) -> list[Reply]:
        """The reply to each request, in order; equal requests are sent once. `answered(count)` is called after every
        few replies.

        Raises: ConfigError for an answer that no further try would change.
        """
        keys = [digest_text(canonical_json({"version": VERSION, **request})) for request in requests]
        distinct = dict(zip(keys, requests, strict=True))
        replies = {key: reply for key in distinct if (reply := self._cached(key)) is not None}
        self.counts["cached"] += len(replies)
        repeats = Counter(keys)
        answered(sum(repeats[key] for key in replies))
        missing = [key for key in distinct if key not in replies]
        if missing and self.server is not None:
            self._use(self.server.start())
        pool = ThreadPoolExecutor(self.runtime.num_parallel, thread_name_prefix="judge")
        try:
            fetched = pool.map(lambda key: self._fetch(key, distinct[key]), missing)
            for key, reply in zip(missing, fetched, strict=True):
                replies[key] = reply
                answered(repeats[key])
                self._count_tokens(reply)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        if self.server is not None and any(replies[key].failure in (UNREACHABLE, DAMAGED) for key in missing):
            self.server.check(patience=5)
        return [replies[key] for key in keys]

    def _count_tokens(self, reply: Reply) -> None:
        usage = (reply.body or {}).get("usage") or {}
        for name, count in usage.items():
            self.counts[name] += count if isinstance(count, int) else 0

    def _path(self, root: Path, key: str) -> Path:
        return root / "judgements" / key[:2] / f"{key[2:]}.json"

    def _cached(self, key: str) -> Reply | None:
        if self.root is None:
            return None
        try:
            return Reply(json.loads(self._path(self.root, key).read_text(encoding="utf-8"))["reply"], "")
        except (OSError, ValueError, KeyError):
            return None  # absent, or damaged: asked again

    def _keep(self, key: str, request: dict[str, Any], body: dict[str, Any]) -> None:
        if self.root is not None:
            path = self._path(self.root, key)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps({"request": request, "reply": body}, ensure_ascii=False))

    def _fetch(self, key: str, request: dict[str, Any]) -> Reply:
        """The reply to one request, after further tries where they may help. Raises: ConfigError where they cannot."""
        body = {name: value for name, value in request.items() if name != "sample"}
        failure, wait = "", self.runtime.backoff_seconds
        for attempt in range(self.runtime.retries + 1):
            if attempt:
                time.sleep(min(wait, 60.0))
                wait *= 2
            try:
                completion = self._post(body)
            except urllib.error.HTTPError as error:
                self._refuse_fatal(error)
                failure = f"judge answered {error.code}"
                if error.code not in RETRIED:
                    break
                after = error.headers.get("Retry-After", "")
                wait = max(wait, float(after)) if after.isdigit() else wait
            except TimeoutError:
                failure = TIMED_OUT
            except urllib.error.URLError as error:
                failure = TIMED_OUT if isinstance(error.reason, TimeoutError) else UNREACHABLE
            except (OSError, ValueError, HTTPException):  # cut off in the middle, or no JSON
                failure = DAMAGED
            else:
                self.counts["asked"] += 1
                self._keep(key, request, completion)
                return Reply(completion, "")
        self.counts["failed"] += 1
        return Reply(None, failure)

    def _refuse_fatal(self, error: urllib.error.HTTPError) -> None:
        """Raises: ConfigError for a status that means the request itself is wrong."""
        detail = error.read(500).decode(errors="replace").strip()
        if error.code in FATAL:
            raise ConfigError(f"the judge at {self.url} {FATAL[error.code]} ({error.code}): {detail[:300]}") from None

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        """The chat completion that the server sends. Raises: OSError, HTTPException, ValueError."""
        key = os.environ.get(self.runtime.api_key_env) or "none"
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        with self.opener.open(request, timeout=self.runtime.timeout_seconds) as response:
            data = json.loads(response.read())
        if not isinstance(data, dict) or not isinstance(data.get("choices"), list) or not data["choices"]:
            raise ValueError("no choices")
        return data
