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

    `outcomes` counts 'plain 200', 'stream 200', 'stream short', 'stream error event', 'plain 503', 'stream broken' and
    the like; 200 stands for a whole answer alone: all its tokens, no error event, the end said. `versions`: whose whole
    answers these were; `sent`: all requests; `longest`: seconds of the slowest one. With `more_tokens` each thread's
    answers are so many longer than the one's before it, so that they do not end together. `padding`: bytes by which
    each request is larger than it need be.
    """

    def __init__(
        self, url: str, model: str, *, threads: int = 4, tokens: int = 24, timeout: float = 120, pause: float = 0.1,
        key: str = "none", more_tokens: int = 0, padding: int = 0,
    ) -> None:  # fmt: skip
        self.url, self.model, self.pause, self._padding = url, model, pause, padding
        self.sent, self.longest = 0, 0.0
        self.outcomes: Counter[str] = Counter()
        self.versions: Counter[str] = Counter()
        self._stop, self._lock = threading.Event(), threading.Lock()
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        self._http = httpx.Client(timeout=timeout, headers=headers, limits=httpx.Limits(max_connections=threads))
        self._threads = [
            threading.Thread(target=self._run, args=(i % 2 == 1, tokens + i % 8 * more_tokens), daemon=True)
            for i in range(threads)
        ]

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
        """Until `more` further requests were answered whole, by `version` if given."""
        goal = self._answered(version) + more
        deadline = time.monotonic() + seconds
        while self._answered(version) < goal:
            assert time.monotonic() < deadline, f"no {more} more answers: {self.outcomes} {self.versions}"
            time.sleep(0.05)

    def failed(self) -> dict[str, int]:
        return {k: v for k, v in self.outcomes.items() if not k.endswith(" 200")}

    def _answered(self, version: str | None) -> int:
        with self._lock:
            outcomes = dict(self.outcomes)
        whole = sum(n for kind, n in outcomes.items() if kind.endswith(" 200"))
        return whole if version is None else self.versions[version]

    def _run(self, stream: bool, tokens: int) -> None:
        while not self._stop.wait(self.pause):
            with self._lock:
                self.sent += 1
            started = time.monotonic()
            outcome, version = self._one(stream, tokens)
            with self._lock:
                self.outcomes[outcome] += 1
                if version and outcome.endswith(" 200"):
                    self.versions[version] += 1
                self.longest = max(self.longest, time.monotonic() - started)

    def _one(self, stream: bool, tokens: int) -> tuple[str, str]:
        kind = "stream" if stream else "plain"
        body: dict[str, Any] = {
            "model": self.model, "messages": [{"role": "user", "content": "Count."}], "max_tokens": tokens,
            "ignore_eos": True, "stream": stream,
        }  # fmt: skip
        if stream:
            body["stream_options"] = {"include_usage": True}
        content = json.dumps(body) + " " * self._padding
        try:
            with self._http.stream("POST", f"{self.url}/v1/chat/completions", content=content) as reply:
                text = reply.read().decode(errors="replace")
                version = reply.headers.get("x-model-version", "")
        except httpx.HTTPError as error:
            return f"{kind} {type(error).__name__}", ""
        if reply.status_code != 200:
            return f"{kind} {reply.status_code}", ""
        return f"{kind} {_became(text, stream, tokens)}", version


def _became(text: str, stream: bool, tokens: int) -> str:
    """What the body of an answer with status 200 is: '200', 'error event', 'short' or 'broken'."""
    # Not splitlines: a token may be one of the line breaks of Unicode, which JSON lets stand.
    lines = [line.removeprefix("data:").strip() for line in text.split("\n") if line.startswith("data:")]
    done = not stream or (bool(lines) and lines[-1] == "[DONE]")
    events: list[dict[str, Any]] = []
    for line in [line for line in lines if line != "[DONE]"] if stream else [text]:
        try:
            events.append(dict(json.loads(line)))
        except (ValueError, TypeError):  # cut off within it, or no JSON at all
            done = False
    # First of all, since vLLM writes [DONE] after an error too.
    if any(event.get("error") for event in events):
        return "error event" if stream else "error"
    if not done:
        return "broken"
    usage = next((event["usage"] for event in reversed(events) if event.get("usage")), {})
    return "200" if usage.get("completion_tokens") == tokens else "short"
