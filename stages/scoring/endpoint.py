"""Stages - chat requests to an OpenAI-compatible endpoint, with answers cached in the store.

    <store>/judgements/<2 hex>/<key>.json       request and reply; deleting the directory costs requests, nothing else

The key is the content of the request (model, messages, sampling, sample number), never the address: the same judge
behind another port is the same judge. Only replies with status 200 are kept: a request that failed is asked again by
the next try, one that succeeded never is.

A judge that fails is never data. A request that cannot be answered now (no credit, overload, no answer in time) ends
`ask` with a TransientError, a request that never will be (400, 401, 413) with a ConfigError; what was answered until
then is kept, so the next try goes on from there. Only an answer that came and cannot be read is a Reply with a reason.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import time
from collections import Counter
from collections.abc import Callable, Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from data_contracts.config import Runtime
from data_contracts.errors import ConfigError, PipelineError, TransientError
from data_contracts.files import write_atomic
from data_contracts.identity import canonical_json, digest_text
from data_contracts.redaction import redact
from stages.models.lazy import LazyModule
from stages.running.loopback import LOOPBACK
from stages.scoring.served import Served

if TYPE_CHECKING:
    import httpx
else:
    httpx = LazyModule("httpx")

VERSION = "1"
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""Statuses that another try may cure."""
UNREACHABLE, TIMED_OUT = "judge cannot be reached", "judge timed out"
BROKEN_OFF, DAMAGED = "judge's answer broke off", "judge's answer was damaged"
OUT_OF_CREDIT = 402
FATAL = {
    400: "cannot answer such a request",
    401: "refuses the key",
    403: "forbids it",
    404: "knows no such model or address",
    405: "is no chat endpoint",
    413: "finds the request too large",
    422: "cannot answer such a request",
}
FAILURES_IN_A_ROW = 8
"""Questions without an answer, one after the other, after which no further one is asked: the judge is away."""
LONGEST_BACKOFF_SECONDS = 60.0
LARGEST_ANSWER_BYTES = 1 << 26
LARGEST_COUNT = 1 << 53
"""Of tokens, as `usage` says them: the largest integer that every reader of JSON holds."""


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
    deadline_seconds: float = Field(900.0, gt=0)
    """A request fails if its whole answer has not come after this long, however steadily the server sends."""
    retries: int = Field(3, ge=0)
    """Further tries of a request that timed out, or got one of 408, 429, 5xx."""
    backoff_seconds: float = Field(1.0, ge=0)
    """Wait before the first further try; doubled each time, at most 60 s. `Retry-After` (seconds or a date) is
    obeyed."""
    retry_after_seconds: float = Field(600.0, ge=0)
    """Longest `Retry-After` that is waited for; a judge that asks for more ends the stage, and the next try goes on."""

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
    """The chat completion as JSON; None: the answer could not be read."""
    failure: str
    """Why there is no body, in words that repeat from request to request; "" if there is one."""

    @property
    def text(self) -> str:
        """The message of the first choice, "" if there is none."""
        try:
            content = (self.body or {})["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            return ""
        if isinstance(content, str):
            return content
        return ""


class _StatusError(Exception):
    """The server answered with another status than 200."""

    def __init__(self, status: int, detail: str, headers: httpx.Headers):
        super().__init__(status)
        self.status, self.detail, self.headers = status, detail, headers


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

    def ask(
        self, requests: Sequence[dict[str, Any]], answered: Callable[[int], None] = lambda count: None
    ) -> list[Reply]:
        """The reply to each request, in order; equal requests are sent once. `answered(count)` is called after every
        few replies.

        Raises: ConfigError for a request that no further try would answer, TransientError for one that a later try may
        answer. What was answered until then is in the cache.
        """
        keys = [digest_text(canonical_json({"version": VERSION, **request})) for request in requests]
        distinct = dict(zip(keys, requests, strict=True))
        replies = {key: reply for key in distinct if (reply := self._cached(key)) is not None}
        self.counts["cached"] += len(replies)
        repeats = Counter(keys)
        answered(sum(repeats[key] for key in replies))
        missing = {key: request for key, request in distinct.items() if key not in replies}
        if missing:
            self._check_key()
        if missing and self.server is not None:
            self._use(self.server.start())
        round_ = _Round(self, missing, lambda key: answered(repeats[key]))
        if missing:
            asyncio.run(round_.run())
        if round_.error is not None:
            if self.server is not None:
                self.server.check(patience=5)  # if the server has ended, its last words say why
            raise round_.error
        return [(replies | round_.replies)[key] for key in keys]

    def _check_key(self) -> None:
        """Raises: ConfigError for a key that no header can carry."""
        key = os.environ.get(self.runtime.api_key_env, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(f"the key in {self.runtime.api_key_env} holds a line break or a letter outside ASCII")

    def count_tokens(self, body: dict[str, Any]) -> None:
        """Add what a completion's `usage` says to the counts."""
        for name, count in (body.get("usage") or {}).items():
            if isinstance(count, int) and 0 <= count < LARGEST_COUNT:
                self.counts[name] += count

    def _path(self, root: Path, key: str) -> Path:
        return root / "judgements" / key[:2] / f"{key[2:]}.json"

    def _cached(self, key: str) -> Reply | None:
        if self.root is None:
            return None
        try:
            return Reply(_checked(json.loads(self._path(self.root, key).read_bytes())["reply"]), "")
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None  # absent, or damaged: asked again

    def keep(self, key: str, request: dict[str, Any], body: dict[str, Any]) -> None:
        """Write a reply into the cache."""
        if self.root is not None:
            path = self._path(self.root, key)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps({"request": request, "reply": body}, ensure_ascii=False))


class _Round:
    """One `ask`: its requests on the way, their replies, and the error that ends it."""

    def __init__(self, endpoint: Endpoint, requests: dict[str, dict[str, Any]], answered: Callable[[str], None]):
        self.endpoint, self.runtime, self.requests, self.answered = endpoint, endpoint.runtime, requests, answered
        self.replies: dict[str, Reply] = {}
        self.error: PipelineError | None = None
        """What `ask` will raise, when the requests under way have come to their end."""
        self.in_a_row = 0
        """Requests without an answer since the last one that got one."""
        self.stopped = asyncio.Event()
        """No further request is sent."""

    async def run(self) -> None:
        """Send all requests, `num_parallel` at once, until they are answered or the round is stopped."""
        queue = iter(self.requests)

        async def work() -> None:
            for key in queue:
                if self.stopped.is_set():
                    return
                await self._answer(client, key)

        async with self._client() as client:
            workers = [asyncio.create_task(work()) for _ in range(min(self.runtime.num_parallel, len(self.requests)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    def _client(self) -> httpx.AsyncClient:
        """The HTTP client. It follows no redirect, which would take the key to another host, and asks a server on this
        machine through no proxy.

        Raises: ConfigError for a proxy that cannot be used.
        """
        address = urlsplit(self.endpoint.url)
        try:
            return httpx.AsyncClient(
                verify=ssl.create_default_context() if address.scheme == "https" else False,
                trust_env=address.hostname not in LOOPBACK,
                follow_redirects=False,
                timeout=self.runtime.timeout_seconds,
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=self.runtime.num_parallel),
            )
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            raise ConfigError(
                "the proxy that the environment names (HTTPS_PROXY, ALL_PROXY) cannot be used for "
                f"{self.endpoint.url}: {redact(str(error))}. Name an http proxy, or the judge's host in NO_PROXY"
            ) from None

    async def _answer(self, client: httpx.AsyncClient, key: str) -> None:
        """Get the reply to one request, after further tries where they may help."""
        request = self.requests[key]
        body = {name: value for name, value in request.items() if name != "sample"}
        failure, asked_wait = "", 0.0
        for attempt in range(self.runtime.retries + 1):
            backoff = min(self.runtime.backoff_seconds * 2 ** min(attempt - 1, 16), LONGEST_BACKOFF_SECONDS)
            if attempt and await self._stopped_within(max(backoff, asked_wait)):
                return
            asked_wait = 0.0
            try:
                completion = await self._post(client, body)
            except _StatusError as error:
                failure = f"judge answered {error.status}"
                if self._is_final(error):
                    return
                asked_wait = _retry_after(error.headers)
                if asked_wait > self.runtime.retry_after_seconds:
                    break
            except (TimeoutError, httpx.TimeoutException):
                failure = TIMED_OUT
            except (httpx.ConnectError, httpx.ProxyError):
                failure = UNREACHABLE
            except (httpx.TransportError, OSError):
                failure = BROKEN_OFF
            except (httpx.DecodingError, ValueError, RecursionError):
                failure = DAMAGED
            else:
                self.endpoint.counts["asked"] += 1
                await asyncio.to_thread(self.endpoint.keep, key, request, completion)
                self.endpoint.count_tokens(completion)
                self._finish(key, Reply(completion, ""))
                return
        self.endpoint.counts["failed"] += 1
        self._fail(key, failure, asked_wait)

    def _finish(self, key: str, reply: Reply) -> None:
        self.replies[key] = reply
        self.in_a_row = 0
        self.answered(key)

    def _fail(self, key: str, failure: str, asked_wait: float) -> None:
        """Take note of a request whose tries are used up: an answer that cannot be read is a reply, unless the judge
        sends nothing else; everything else ends the round.
        """
        self.in_a_row += 1
        is_away = self.in_a_row >= FAILURES_IN_A_ROW
        if failure == DAMAGED and not is_away:
            self.replies[key] = Reply(None, failure)
            self.answered(key)
            return
        if is_away or asked_wait > self.runtime.retry_after_seconds:
            self.stopped.set()
        if self.error is None:
            self.error = TransientError(self._sentence(failure, asked_wait, self.requests[key].get("model", "MODEL")))

    def _sentence(self, failure: str, asked_wait: float, model: str) -> str:
        url, kept = self.endpoint.url, "What was answered is kept; run the same command again to go on from there"
        if failure == UNREACHABLE:
            return (
                f"nobody answers at {url}: start the judge, e.g. `vllm serve {model}`, or set runtime.base_url. {kept}"
            )
        if asked_wait > self.runtime.retry_after_seconds:
            return (
                f"the judge at {url} asks to wait {asked_wait:.0f} s ({failure}), and runtime.retry_after_seconds is "
                f"{self.runtime.retry_after_seconds:g}. {kept}, or raise the setting"
            )
        tries = f"{self.runtime.retries + 1} tries" if self.runtime.retries else "one try"
        return f"the judge at {url} left a question without an answer after {tries}: {failure}. {kept}"

    def _is_final(self, error: _StatusError) -> bool:
        """Whether a status ends the round at once: no other request would fare better."""
        if error.status in RETRIED or error.status >= 500:
            return False
        self.stopped.set()
        if self.error is not None and not isinstance(self.error, TransientError):
            return True
        url, said = self.endpoint.url, redact(error.detail)[:300]
        if error.status == OUT_OF_CREDIT:
            self.error = TransientError(
                f"the judge at {url} wants to be paid (402): {said}. What was answered is kept; top up the account and "
                "run the same command again to go on from there"
            )
        elif 300 <= error.status < 400:
            target = redact(error.headers.get("Location", ""))[:200]
            self.error = ConfigError(
                f"the judge at {url} answers {error.status} and points to {target!r}: a redirect is not followed, "
                "because the key would go along. If that address is the judge's, set runtime.base_url to it"
            )
        else:
            reason = FATAL.get(error.status, "does not answer such a request")
            self.error = ConfigError(f"the judge at {url} {reason} ({error.status}): {said}")
        return True

    async def _stopped_within(self, seconds: float) -> bool:
        """Wait, but no longer than until the round is stopped. Returns: whether it was."""
        try:
            async with asyncio.timeout(seconds):
                await self.stopped.wait()
        except TimeoutError:
            return False
        return True

    async def _post(self, client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
        """The chat completion that the server sends.

        Raises: _StatusError, TimeoutError, httpx.HTTPError, ValueError or RecursionError for what is no completion.
        """
        key = os.environ.get(self.runtime.api_key_env, "").strip() or "none"
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        data = bytearray()
        async with (
            asyncio.timeout(self.runtime.deadline_seconds),
            client.stream("POST", self.endpoint.url, content=json.dumps(body).encode(), headers=headers) as response,
        ):
            is_answer = response.status_code == 200
            async for chunk in response.aiter_bytes():
                data += chunk
                if len(data) > (LARGEST_ANSWER_BYTES if is_answer else 2000):
                    break
        if not is_answer:
            detail = " ".join(bytes(data).decode(errors="replace").split())
            raise _StatusError(response.status_code, detail, response.headers)
        return _checked(json.loads(bytes(data)))


def _checked(completion: Any) -> dict[str, Any]:
    """The completion as it came. Raises: ValueError if it is none: no choices, another `usage`, text that is no
    Unicode."""
    if not isinstance(completion, dict) or not isinstance(completion.get("choices"), list) or not completion["choices"]:
        raise ValueError("no choices")
    if not isinstance(completion.get("usage") or {}, dict):
        raise ValueError("another usage")
    json.dumps(completion, ensure_ascii=False).encode()  # a lone surrogate has no UTF-8
    return completion


def _retry_after(headers: httpx.Headers) -> float:
    """The seconds that `Retry-After` asks for, given as seconds or as a date; 0 where there is none."""
    value = headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:12])
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
