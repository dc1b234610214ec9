"""A small local server that speaks the streaming protocol of OpenAI-compatible engines, at set delays.

It computes nothing: every answer is a count of tokens that are sent when the test says so. `style` decides which
engine's dialect it speaks, `fault` what goes wrong.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

DRAFT_TOKENS = 3
KNOWN_TO_TRANSFORMERS = {
    *("model", "prompt", "messages", "max_tokens", "temperature", "stream", "stream_options", "generation_config"),
}
OWNERS = {"vllm": "vllm", "sglang": "sglang", "llama.cpp": "llamacpp"}
PAGES: dict[str, dict[str, Any]] = {
    "vllm": {"/version": {"version": "0.32.0"}},
    "sglang": {"/server_info": {"version": "0.5.9", "speculative_num_steps": 3, "model_path": "somewhere"}},
    "llama.cpp": {"/props": {"build_info": "b8681"}},
    "transformers": {"/openapi.json": {"paths": {"/load_model": {}, "/v1/completions": {}}}},
    "plain": {},
}


@dataclass
class Seen:
    """One request as the server saw it; times on `time.monotonic`, which is also the clock of asyncio."""

    body: dict[str, Any]
    headers: dict[str, str]
    arrived: float
    at_once: int
    sent: list[float] = field(default_factory=list)


@dataclass
class Behaviour:
    """`per_step`: tokens of each chunk after the first, in turn; one more than the drafted tokens it accepted.

    `level`: vLLM's ``--per-request-spec-decode-metrics``. `answers`: at most so many tokens, whatever is asked for.
    """

    style: str = "vllm"
    models: tuple[str, ...] = ("tiny",)
    first_s: float = 0.04
    step_s: float = 0.01
    per_step: tuple[int, ...] = (1,)
    level: str | None = None
    metrics: bool = True
    usage: bool = True
    answers: int | None = None
    cached_tokens: int | None = None
    api_key: str | None = None
    fault: str | None = None
    """``http``: 500 with a message. ``breaks``, ``ends``: no more bytes after two chunks, without and with a proper
    end of the body. ``hangs``: nothing after two chunks. ``event``: an error as third event. ``page``: no events."""
    faulty_from: int = 1
    """Which request has the fault, from 0; request 0 is the one that asks what the server understands."""


class OpenAIServer:
    """Serves while it is entered; `seen` holds every request for tokens, the first one first."""

    def __init__(self, **behaviour: Any) -> None:
        self.behaviour = Behaviour(**behaviour)
        self.seen: list[Seen] = []
        self.counters = dict.fromkeys(("drafts", "draft_tokens", "accepted_tokens", "generation_tokens"), 0)
        self.by_position = [0] * DRAFT_TOKENS
        self.lock = threading.Lock()
        self.flying = 0
        self.stopped = threading.Event()

    def __enter__(self) -> OpenAIServer:
        server = self

        class Handler(_Handler):
            owner = server

        self._http = _Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *fault: object) -> None:
        self.stopped.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def measured(self) -> list[Seen]:
        """What came after the request that asked what the server understands."""
        return [one for one in self.seen if one.body["max_tokens"] != 2]

    @property
    def most_at_once(self) -> int:
        return max(one.at_once for one in self.measured)

    def prometheus(self) -> str:
        """What /metrics says."""
        label = '{engine="0",model_name="tiny"}'
        lines = []
        for name, value in self.counters.items():
            full = "vllm:generation_tokens" if name == "generation_tokens" else f"vllm:spec_decode_num_{name}"
            lines += [f"# TYPE {full}_total counter", f"{full}_total{label} {value}.0"]
        name = "vllm:spec_decode_num_accepted_tokens_per_pos"
        lines.append(f"# TYPE {name}_total counter")
        for position, value in enumerate(self.by_position):
            lines.append(f'{name}_total{{engine="0",model_name="tiny",position="{position}"}} {value}.0')
        lines += ["# TYPE vllm:num_requests_running gauge", f"vllm:num_requests_running{label} {self.flying}"]
        lines += ["# TYPE http_requests_total counter", f"http_requests_total {len(self.seen)}"]
        return "\n".join(lines) + "\n"


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


class _Handler(BaseHTTPRequestHandler):
    owner: OpenAIServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        how = self.owner.behaviour
        pages: dict[str, Any] = dict(PAGES[how.style])
        rows = [{"id": name, "object": "model", "owned_by": OWNERS.get(how.style, "you")} for name in how.models]
        pages["/v1/models"] = {"object": "list", "data": rows}
        if not self._allowed():
            self._reply(401, {"error": {"message": "invalid key"}})
        elif self.path == "/metrics" and how.metrics:
            self._reply(200, self.owner.prometheus())
        elif self.path in pages:
            self._reply(200, pages[self.path])
        else:
            self._reply(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        owner = self.owner
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        refused = self._refused(body)
        if refused:
            self._reply(*refused)
            return
        with owner.lock:
            owner.flying += 1
            seen = Seen(body, dict(self.headers), time.monotonic(), owner.flying)
            owner.seen.append(seen)
            number = len(owner.seen) - 1
        try:
            self._answer(seen, owner.behaviour.fault if number >= owner.behaviour.faulty_from else None)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with owner.lock:
                owner.flying -= 1

    def _allowed(self) -> bool:
        key = self.owner.behaviour.api_key
        return key is None or self.headers.get("Authorization") == f"Bearer {key}"

    def _refused(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        how = self.owner.behaviour
        if not self._allowed():
            return 401, {"error": {"message": "invalid key"}}
        if body["model"] not in how.models and how.style != "transformers":
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        if how.style == "transformers":
            unexpected = sorted(set(body) - KNOWN_TO_TRANSFORMERS)
            if unexpected:
                return 422, {"detail": f"Unexpected fields in the request: {unexpected}"}
            if "prompt" in body and not isinstance(body["prompt"], str):
                return 400, {"detail": "prompt must be a string."}
        if body["max_tokens"] > 1000:
            return 400, {"error": {"message": "max_tokens must be at most 1000"}}
        return None

    def _answer(self, seen: Seen, fault: str | None) -> None:
        if fault == "http":
            self._reply(500, {"error": {"message": "out of memory"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if fault == "page":
            self._chunk(b"<html>sorry</html>\n")
            self._chunk(b"")
            return
        for step, (wait_s, event) in enumerate(_events(self.owner, seen)):
            if fault in ("breaks", "ends", "hangs", "event") and step == 2:
                self._fail(fault)
                return
            self.owner.stopped.wait(wait_s)
            if wait_s:
                seen.sent.append(time.monotonic())
            self._chunk(b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\n\n")
        self._chunk(b"")

    def _fail(self, fault: str) -> None:
        if fault == "event":
            self._chunk(b'data: {"error": {"message": "engine died"}}\n\n')
        if fault == "hangs":
            self.owner.stopped.wait(30)
        if fault in ("ends", "event"):
            self._chunk(b"")
        self.close_connection = True

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _reply(self, status: int, body: Any) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _events(owner: OpenAIServer, seen: Seen) -> Iterator[tuple[float, Any]]:
    """Give (seconds to wait, event) for one answer."""
    how, body = owner.behaviour, seen.body
    wanted = min(body["max_tokens"], how.answers or body["max_tokens"])
    prompt = body.get("prompt", "a chat")
    prompt_tokens = len(prompt) if isinstance(prompt, list) else len(prompt.split())
    options = body.get("stream_options", {}) if how.usage else {}
    running = how.style in ("vllm", "sglang") and options.get("continuous_usage_stats")
    given, accepted = 0, []
    sizes = itertools.chain([1], itertools.cycle(how.per_step))
    if "messages" in body:
        yield 0, _chunk(how, body, "", 0, None)
    while given < wanted:
        size = next(sizes)
        if given:
            accepted.append(size - 1)
        sent = min(size, wanted - given)
        given += sent
        event = _chunk(how, body, "x" * sent, sent, "length" if given == wanted else None)
        if running:
            event["usage"] = {"prompt_tokens": prompt_tokens, "completion_tokens": given}
        yield (how.step_s if given > sent else how.first_s), event
    _count(owner, given, accepted)
    last: dict[str, Any] = {"choices": [], **_told(how, body, accepted)}
    if options.get("include_usage"):
        last["usage"] = {"prompt_tokens": prompt_tokens, "completion_tokens": given}
        if how.cached_tokens is not None:
            last["usage"]["prompt_tokens_details"] = {"cached_tokens": how.cached_tokens}
    yield 0, last
    if how.style != "transformers":
        yield 0, b"[DONE]"


def _chunk(how: Behaviour, body: dict[str, Any], text: str, tokens: int, finish: str | None) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
    if "messages" in body:
        choice["delta"] = {"content": text} if text else {"role": "assistant", "content": ""}
    else:
        choice["text"] = text
    if how.style == "vllm":
        choice["token_ids"] = [7] * tokens if body.get("return_token_ids") and tokens else None
    return {"object": "text_completion", "model": body["model"], "choices": [choice]}


def _count(owner: OpenAIServer, given: int, accepted: list[int]) -> None:
    with owner.lock:
        owner.counters["generation_tokens"] += given
        if owner.behaviour.level is None:
            return
        owner.counters["drafts"] += len(accepted)
        owner.counters["draft_tokens"] += DRAFT_TOKENS * len(accepted)
        owner.counters["accepted_tokens"] += sum(accepted)
        for position in range(DRAFT_TOKENS):
            owner.by_position[position] += sum(number > position for number in accepted)


def _told(how: Behaviour, body: dict[str, Any], accepted: list[int]) -> dict[str, Any]:
    """What the last event says about speculation, in the dialect of each engine."""
    if how.level is None:
        return {}
    drafted = DRAFT_TOKENS * len(accepted)
    if how.style == "sglang" and body.get("return_spec_tokens_details"):
        details = {"spec_verify_ct": len(accepted), "spec_num_proposed_drafts": drafted}
        return {"sglext": {"spec_tokens_details": {**details, "spec_num_correct_drafts": sum(accepted)}}}
    if how.style == "llama.cpp":
        return {"timings": {"predicted_n": 1, "draft_n": drafted, "draft_n_accepted": sum(accepted)}}
    if how.style != "vllm":
        return {}
    found: dict[str, Any] = {
        "acceptance_histogram": [accepted.count(number) for number in range(DRAFT_TOKENS + 1)],
        "num_spec_steps": len(accepted),
        "num_accepted_draft_tokens": sum(accepted),
        "num_draft_tokens": drafted,
        "num_spec_tokens": DRAFT_TOKENS,
    }
    if how.level == "detailed":
        found |= {"per_step_accepted": accepted, "per_step_drafted": [DRAFT_TOKENS] * len(accepted)}
    return {"metrics": {"speculative_decoding": found}}
