"""`samples/web` in headless Chromium: what the page shows, against Python; `ci/web` runs this on the trained adapters too."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from javascript import HERE, SAMPLES, needs_node, node

from lora_export.artifact import read_manifest
from lora_export.trial import run_trial

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
GIVEN = os.environ.get("LORA_EXPORT_WEB")  # an exported folder, and where screenshots go, from ci/web
# A graphics card in software, for machines without one.
SOFTWARE_GPU = (
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
    "--enable-features=Vulkan",
    "--use-vulkan=swiftshader",
)
needs_chromium = pytest.mark.skipif(shutil.which(CHROMIUM) is None, reason="Chromium is not here: ci/web installs it")
pytestmark = needs_node
TEXTS = ("Compute the mean of a list.", "MIT Licence: as is, without warranty", "x = lambda y: y ** 2", "ünïcode 🙂")


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of the page with `folder`."""
    command = ["node", str(SAMPLES / "web" / "serve.js"), str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield server.stdout.readline().strip()
        finally:
            server.terminate()


def use(
    folder: Path, steps: list[dict], out: Path, *, query: str = "?device=wasm", flags: tuple[str, ...] = ()
) -> dict:
    (out / "steps.json").write_text(json.dumps(steps))
    with served(folder) as url:
        return json.loads(node(HERE / "page.mjs", url + query, out / "steps.json", out, *flags))


def require_scores_of_python(folder: Path, state: dict) -> None:
    """Every line's probabilities within 1e-3 of Python's, and shown as they are."""
    assert state["problem"] == ""
    full = [line for line in state["lines"] if line["text"].strip()]
    assert [(line["text"], line["adapter"]) for line in full] == [
        (each["text"], each["adapter"]) for each in state["found"]
    ]
    for line, each in zip(full, state["found"], strict=True):
        (expected,) = run_trial(folder, [each["text"]], {each["adapter"]: 1.0}, provider="cpu", max_new_tokens=1)[
            "results"
        ]
        scores = {score["label"]: score["score"] for score in each["scores"]}
        assert scores.keys() == expected["scores"].keys()
        for label, score in scores.items():
            assert abs(score - expected["scores"][label]) < 1e-3, (each["text"], label)
        best = sorted(expected["scores"].items(), key=lambda item: -item[1])[:3]
        assert [row[0] for row in line["shown"]] == [label for label, _ in best]
        for (_, score), row in zip(best, line["shown"], strict=True):
            assert abs(float(row[-1].removesuffix("%")) / 100 - score) < 2e-3


@needs_chromium
def test_the_page_shows_pythons_scores_whatever_is_typed_and_chosen(exports, tmp_path):
    folder = Path(GIVEN) if GIVEN else exports["bert-required"]
    names = [record.name for record in read_manifest(folder).adapters]
    later = tmp_path / "later.onnx_adapter"
    later.write_bytes((folder / "adapters" / f"{names[0]}.onnx_adapter").read_bytes())
    cut = tmp_path / "cut.onnx_adapter"
    cut.write_bytes(later.read_bytes()[:-1000])
    other = tmp_path / "other.onnx_adapter"
    other.write_bytes((exports["llama-kinds-required"] / "adapters" / "chat.onnx_adapter").read_bytes())
    steps = [
        *({"do": "type", "line": line, "text": text} for line, text in enumerate(TEXTS[:3])),
        {"do": "choose", "line": 0, "adapter": names[1]},
        {"do": "choose", "line": 1, "adapter": names[0]},
        {"do": "add"},
        {"do": "type", "line": 3, "text": TEXTS[3]},
        {"do": "remove", "line": 2},
        {"do": "load", "file": str(later)},
        {"do": "load", "file": str(cut)},
        {"do": "load", "file": str(other)},
        {"do": "choose", "line": 0, "adapter": names[0]},
    ]
    out = Path(os.environ.get("LORA_EXPORT_SCREENSHOTS", tmp_path))
    found = use(folder, steps, out)
    assert found["errors"] == []
    good = [*found["states"][:10], found["states"][-1]]
    for state in good:
        require_scores_of_python(folder, state)
        assert state["device"] == "WebAssembly"
    assert [line["text"] for line in good[-1]["lines"]] == [TEXTS[0], TEXTS[1], TEXTS[3]]
    assert len({line["adapter"] for line in good[0]["lines"]}) == len(names), "another adapter on each line"
    cut_state, other_state = found["states"][10:12]
    assert "truncated" in cut_state["problem"] and "[cut.onnx_adapter" in cut_state["problem"]
    assert "made for another graph" in other_state["problem"]
    assert "[other.onnx_adapter: model.layers.0.self_attn" in other_state["problem"]
    assert found["fetched"]["/export/model.onnx.data"] == found["fetched"]["/export/model.onnx"] == 1
    assert found["widths"] == {
        name: [width, width] for name, width in (("desktop", 1200), ("phone", 390), ("narrow", 320))
    }


@needs_chromium
def test_a_damaged_folder_is_told_instead_of_scores(exports, own, tmp_path):
    folder = own(exports["bert-required"])
    file = folder / "adapters" / "topic.onnx_adapter"
    file.write_bytes(file.read_bytes()[:-1])
    (state,) = use(folder, [], tmp_path)["states"]
    assert "[adapters/topic.onnx_adapter]" in state["problem"] and state["found"] == []


@needs_chromium
@pytest.mark.skipif(not GIVEN, reason="minutes of a graphics card in software: ci/web runs it")
def test_the_page_chooses_webgpu_where_it_gives_the_same_numbers(exports, tmp_path):
    folder = exports["bert-required"]
    steps = [{"do": "choose", "line": 0, "adapter": "kind"}]
    for state in use(folder, steps, tmp_path, query="", flags=SOFTWARE_GPU)["states"]:
        assert state["device"] == "WebGPU"
        require_scores_of_python(folder, state)


def test_the_server_gives_parts_of_files_and_nothing_outside(exports):
    folder = exports["bert-required"]

    def get(path: str, **headers: str) -> tuple[int, bytes]:
        request = urllib.request.Request(url.rstrip("/") + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, b""

    with served(folder) as url:
        data = (folder / "model.onnx.data").read_bytes()
        assert get("/export/model.onnx.data") == (200, data)
        assert get("/export/model.onnx.data", Range="bytes=4096-5000") == (206, data[4096:5001])
        assert get("/export/model.onnx.data", Range=f"bytes={len(data)}-") == (416, b"")
        for path in (
            "/../package.json",
            "/%2e%2e/package.json",
            "/js/..%2f..%2fREADME.md",
            "/export/%2e%2e%2fx",
            "/none",
            "/js/",
        ):
            assert get(path)[0] == 404, path
        assert b"<title>" in get("/")[1]
