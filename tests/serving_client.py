"""A steady client of an endpoint: plain and streamed requests in turn, every one accounted for."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from typing import Any

import httpx


class SteadyClient:
    """Asks from `threads` threads until it is stopped, half of them streaming.

    `outcomes` counts 'plain 200', 'stream 200', 'stream error event', 'plain 503', 'stream broken' and the like;
    `versions` the versions that answered; `sent` all requests. `longest`: seconds of the slowest one.
    """

    def __init__(
        self, url: str, model: str, *, threads: int = 4, tokens: int = 24, timeout: float = 120, pause: float = 0.1,
        key: str = "none",
    ) -> None:  # fmt: skip
        self.url, self.model, self.tokens, self.pause = url, model, tokens, pause
        self.sent, self.longest = 0, 0.0
        self.outcomes: Counter[str] = Counter()
        self.versions: Counter[str] = Counter()
        self._stop, self._lock = threading.Event(), threading.Lock()
        headers = {"authorization": f"Bearer {key}"}
        self._http = httpx.Client(timeout=timeout, headers=headers, limits=httpx.Limits(max_connections=threads))
        self._threads = [threading.Thread(target=self._run, args=(i % 2 == 1,), daemon=True) for i in range(threads)]

    def __enter__(self) -> SteadyClient:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=180)
        self._http.close()

    def wait(self, version: str | None = None, more: int = 8, seconds: float = 240) -> None:
        """Until `more` further requests were answered, by `version` if given."""
        goal = self._answered(version) + more
        deadline = time.monotonic() + seconds
        while self._answered(version) < goal:
            assert time.monotonic() < deadline, f"no {more} more answers: {self.outcomes} {self.versions}"
            time.sleep(0.05)

    def failed(self) -> dict[str, int]:
        return {k: v for k, v in self.outcomes.items() if not k.endswith(" 200")}

    def _answered(self, version: str | None) -> int:
        return sum(self.outcomes.values()) if version is None else self.versions[version]

    def _run(self, stream: bool) -> None:
        while not self._stop.wait(self.pause):
            with self._lock:
                self.sent += 1
            started = time.monotonic()
            outcome, version = self._one(stream)
            with self._lock:
                self.outcomes[outcome] += 1
                if version:
                    self.versions[version] += 1
                self.longest = max(self.longest, time.monotonic() - started)

    def _one(self, stream: bool) -> tuple[str, str]:
        kind = "stream" if stream else "plain"
        body: dict[str, Any] = {
            "model": self.model, "messages": [{"role": "user", "content": "Count."}], "max_tokens": self.tokens,
            "ignore_eos": True, "stream": stream,
        }  # fmt: skip
        try:
            with self._http.stream("POST", f"{self.url}/v1/chat/completions", json=body) as reply:
                text = reply.read().decode()
                version = reply.headers.get("x-model-version", "")
        except httpx.HTTPError as error:
            return f"{kind} {type(error).__name__}", ""
        if reply.status_code != 200:
            return f"{kind} {reply.status_code}", ""
        if not stream:
            whole = json.loads(text)["usage"]["completion_tokens"] == self.tokens
            return "plain 200" if whole else "plain short", version
        if text.rstrip().endswith("data: [DONE]"):
            return "stream 200", version
        return ("stream error event" if '"error"' in text else "stream broken"), version
