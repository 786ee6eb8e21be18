"""The process: its command, its key, its end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import httpx2
import pytest
from command_line import fails
from live import WAIT_S, running, wait_until

from lora_export.cli import serve as command
from lora_export.errors import EnvironmentUnusable, UsageProblem
from lora_export.serve.options import ServeOptions
from lora_export.serve.server import listen
from lora_export.serve.service import Service

ROOT = Path(__file__).parents[2]


def test_the_command_serves_until_sigterm_and_ends_with_0(exports):
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_export.cli.main", "serve", str(exports["features-dynamic"]), "--port", "0",
         "--model-name", "words", "--threads", "1"],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"LORA_EXPORT_API_KEY": "from the environment"},
    )  # fmt: skip
    try:
        lines = [process.stderr.readline() for _ in range(2)]
        url = re.search(r"serving words with features on (http://127\.0\.0\.1:\d+) \(cpu\)", lines[0])[1]
        assert json.loads(lines[1])["event"] == "serving"
        wait_until(lambda: is_up(url))
        key = {"Authorization": "Bearer from the environment"}
        body = {"model": "features", "input": "x"}
        assert httpx2.post(f"{url}/v1/embeddings", json=body).status_code == 401
        assert httpx2.post(f"{url}/v1/embeddings", json=body, headers=key).status_code == 200
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(WAIT_S) == 0
        events = [json.loads(line)["event"] for line in rest.splitlines()]
        assert "draining" in events and events[-1] == "ended"
    finally:
        process.kill()
        process.wait()


def is_up(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health").status_code == 200
    except httpx2.TransportError:
        return False


def test_an_end_waits_for_the_requests_that_there_are(exports):
    with running(exports["features-dynamic"], model_name="words") as live:
        go, run = threading.Event(), live.service.batcher._run
        live.service.batcher._run = lambda rows: go.wait(20) and run(rows)
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(live.post, "/v1/embeddings", model="features", input="x")
            wait_until(lambda: live.service.load().running)
            live.server.begin_to_end()
            with live.http() as client:  # it still answers, so that a load balancer sees it
                assert client.get("/ready").status_code == 503
                refused = client.post("/v1/embeddings", json={"model": "features", "input": "x"})
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            go.set()
            assert call.result().status_code == 200
        wait_until(lambda: live.server.should_exit)


def test_an_end_waits_no_longer_than_it_may(exports):
    with running(exports["features-dynamic"], model_name="words", drain_s=0.1) as live:
        go = threading.Event()
        live.service.batcher._run = lambda rows: go.wait(20) and [ValueError()] * len(rows)
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(live.post, "/v1/embeddings", model="features", input="x")
            wait_until(lambda: live.service.load().running)
            live.server.begin_to_end()
            wait_until(lambda: live.server.should_exit)
            go.set()
            call.exception(WAIT_S)


def test_a_key_is_asked_for_under_v1_only(exports):
    with running(exports["features-dynamic"], model_name="words", api_key="secret") as live, live.http() as client:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Bearer secret2"},
            {"Authorization": ""},
        ):
            found = client.get("/v1/models", headers=headers)
            assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key")
        assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert len(live.openai("secret").models.list().data) == 2
        for path in ("/health", "/ready", "/metrics", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200
        assert "secret" not in str(live.lines)


def test_without_a_key_a_web_page_s_own_name_is_not_answered(exports):
    with running(exports["features-dynamic"], model_name="words") as live, live.http() as client:
        for host, status in (
            ("evil.example", 421),
            ("127.0.0.1.evil.example:80", 421),
            ("localhost:1", 200),
            ("[::1]", 200),
        ):
            assert client.get("/v1/models", headers={"Host": host}).status_code == status


def test_the_page_describes_every_path(exports):
    with running(exports["features-dynamic"], model_name="words") as live, live.http() as client:
        described = client.get("/openapi.json").json()
    assert {path for path in described["paths"] if path.startswith("/v1/")} >= {
        "/v1/embeddings", "/v1/classify", "/v1/models", "/v1/models/{model}", "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
    }  # fmt: skip
    assert described["components"]["schemas"]["EmbeddingBody"]["additionalProperties"] is False


def test_a_missing_package_is_named_with_the_extra(monkeypatch, exports):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == "uvicorn" else name)
    with pytest.raises(EnvironmentUnusable) as found:
        command.require_packages()
    assert found.value.found == "no uvicorn" and "pip install 'lora-export[serve]'" in found.value.next_step
    said = fails(4, "serve", exports["features-dynamic"])
    assert "A package that the server needs is not installed" in said


def test_what_cannot_be_served_is_refused_before_it_listens(exports, tmp_path):
    assert "The server does not serve this task" in fails(3, "serve", exports["clip-dynamic"])
    assert "The folder holds no export" in fails(3, "serve", tmp_path)
    said = fails(2, "serve", exports["features-dynamic"], "--model-name", "features")
    assert "would both be called 'features'" in said
    said = fails(2, "serve", exports["features-dynamic"], "--max-length", 500)
    assert "The model takes no rows of that length" in said and "at most 160" in said


@pytest.mark.parametrize("key", ["", "  "])
def test_a_key_that_is_none_is_refused(key, exports, monkeypatch):
    with pytest.raises(UsageProblem, match="The key is empty"):
        Service(exports["features-dynamic"], ServeOptions(api_key=key))
    assert "The key is empty" in fails(2, "serve", exports["features-dynamic"], "--api-key", key)
    monkeypatch.setenv("LORA_EXPORT_API_KEY", key)
    assert "The key is empty" in fails(2, "serve", exports["features-dynamic"])


def test_answers_do_not_wait_for_acknowledgements():
    """asyncio turns Nagle's algorithm off for sockets that name TCP only: 40 ms a request otherwise."""
    with listen("127.0.0.1", 0) as listening:
        assert listening.proto == socket.IPPROTO_TCP


def test_an_address_in_use_is_one_error(exports):
    with running(exports["features-dynamic"], model_name="words") as live:
        port = live.url.rpartition(":")[2]
        said = fails(4, "serve", exports["features-dynamic"], "--port", port)
    assert "in use" in said


def options_table() -> str:
    """The table of docs/serve.md."""
    rows = ["| option | default | |", "|---|---|---|"]
    for option in command.serve_command.params:
        if isinstance(option, click.Option):
            said, _, default = option.help.partition("  [default: ")
            shown = option.opts[0] if option.secondary_opts else option.default
            default = default.rstrip("]") or (f"`{shown}`" if option.show_default else "")
            names = "`, `".join((*option.opts, *option.secondary_opts))
            rows.append(f"| `{names}` | {default or '–'} | {said.rstrip('.')} |")
    return "\n".join(rows)


def test_the_page_has_every_option():
    page = (ROOT / "docs/serve.md").read_text(encoding="utf-8")
    assert page.split("## Options\n\n")[1].rstrip("\n") == options_table()
