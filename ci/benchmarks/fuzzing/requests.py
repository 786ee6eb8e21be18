"""Requests to a server in this process: its application is called as a server of ASGI calls it, without a socket."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from pathlib import Path

_OF_ENCODERS = (
    ("POST", "/v1/embeddings", {"model": "base", "input": ["One.", "Two."], "encoding_format": "base64", "user": "u"}),
    ("POST", "/v1/embeddings", {"model": "one", "input": [1, 2, 3]}),
    ("POST", "/v1/classify", {"model": "one", "input": "One."}),
)
_OF_WRITERS = (
    ("POST", "/v1/completions", {"model": "one", "prompt": "One.", "max_tokens": 2, "temperature": 0.5, "seed": 1,
                                 "stop": ["x"], "stream": True, "stream_options": {"include_usage": True}}),
    ("POST", "/v1/completions", {"model": "one:0.5+one:0.5", "prompt": [[1, 2], [3]], "max_tokens": 1, "top_p": 0.5,
                                 "top_k": 2, "repetition_penalty": 1.1, "n": 1, "logit_bias": None}),
    ("POST", "/v1/chat/completions", {"model": "one", "messages": [{"role": "user", "content": "One."},
                                      {"role": "user", "content": [{"type": "text", "text": "x"}]}], "max_tokens": 1}),
)  # fmt: skip
_OF_ALL = (
    ("POST", "/v1/load_lora_adapter", {"lora_name": "late", "lora_path": "OUT/adapters/one.onnx_adapter"}),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "late"}),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/one", None),
    ("GET", "/metrics", None),
    ("GET", "/openapi.json", None),
)
_WORDS = (
    "model", "input", "prompt", "messages", "max_tokens", "stream", "stop", "seed", "n", "temperature", "lora_name",
    "lora_path", "load_inplace", "encoding_format", "suffix", "logprobs", "tools",
)  # fmt: skip
_MOST_SECONDS = 8.0


def requests_of(export: Path) -> tuple[tuple[bytes, ...], Callable[[bytes], None], tuple[str, ...]]:
    """Valid requests to a server of `export`, what sends one, and the words of their bodies."""
    from lora_export.artifact import read_manifest
    from lora_export.serve.api import build
    from lora_export.serve.logs import NAME
    from lora_export.serve.options import ServeOptions
    from lora_export.serve.service import Service

    logging.getLogger(NAME).setLevel(logging.CRITICAL + 1)
    name = read_manifest(export).adapters[0].name
    options = ServeOptions(
        provider="cpu", n_threads=1, max_length=24, max_wait_ms=0, timeout_s=_MOST_SECONDS, model_name="base",
        runtime_adapters=export.parent, max_queue=64,
    )  # fmt: skip
    service = Service(export, options)
    app, loop = build(service), asyncio.new_event_loop()
    seeds = [*(_OF_WRITERS if service.models.writes else _OF_ENCODERS), *_OF_ALL]
    return (
        tuple(_as_bytes(*seed).replace(b"one", name.encode()).replace(b"OUT", export.name.encode()) for seed in seeds),
        lambda content: _send(app, loop, content),
        _WORDS,
    )


def _as_bytes(method: str, path: str, body: object) -> bytes:
    return f"{method} {path}\n".encode() + (b"" if body is None else json.dumps(body).encode())


def _send(app, loop: asyncio.AbstractEventLoop, content: bytes) -> None:
    """Send a request to its end.

    Raises:
        InputRefused: It was answered by a 4xx.
        RuntimeError: It was answered by something else than a 2xx.
    """
    from lora_export.errors import InputRefused

    first, _, body = content.partition(b"\n")
    method, _, path = first.decode("utf-8", "replace").partition(" ")
    path, _, query = path.partition("?")
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method.upper() or "GET",
        "scheme": "http", "path": path or "/", "raw_path": path.encode("utf-8", "replace"), "root_path": "",
        "query_string": query.encode("utf-8", "replace"), "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
        "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json"),
                    (b"content-length", str(len(body)).encode())],
    }  # fmt: skip
    parts, answer = [{"type": "http.request", "body": body, "more_body": False}], []

    async def receive() -> dict:
        if parts:
            return parts.pop()
        await asyncio.Event().wait()

    async def send(message: dict) -> None:
        answer.append(message)

    loop.run_until_complete(app(scope, receive, send))
    status = answer[0]["status"] if answer else 0
    said = b"".join(message.get("body", b"") for message in answer)
    if 400 <= status < 500:
        json.loads(said)["error"]["message"]
        raise InputRefused(f"{path[:40]} answered {status}")
    if not 200 <= status < 400:
        raise RuntimeError(f"{path[:40]} answered {status}: {said[:200]!r}")
