"""`samples/cpp`, compiled and run: one adapter by ONNX Runtime's own LoraAdapter, mixed rows by plain inputs."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from faults import FAULTS, damage
from javascript import SAMPLES

from lora_export.runtime.adapter_session import AdapterSession

pytestmark = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("g++") is None or not (SAMPLES / "node_modules").is_dir(),
    reason="cmake, g++, or the headers and library that ci/setup hosts installs are not here",
)
IDS = ([5, 9, 12, 70, 71, 40], [8, 9, 10, 11], [60, 5, 9, 70, 3, 17])


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cpp")
    for arguments in (
        # By name: in a whole run of the tests, something sets CXX to gcc, which does not link C++.
        ["-S", str(SAMPLES / "cpp"), "-B", str(folder), "-DCMAKE_CXX_COMPILER=g++"],
        ["--build", str(folder)],
    ):
        done = subprocess.run(["cmake", *arguments], capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning" not in done.stderr
    return folder / "lora_rows"


def call(program: Path, folder: Path, mode: str, names: str, *, code: int = 0, ids: Sequence = IDS) -> str:
    lines = "\n".join(" ".join(map(str, row)) for row in ids)
    command = [str(program), str(folder), mode, names]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout


def expected(session: AdapterSession, adapters) -> list[np.ndarray]:
    """Each row's logits, of a decoder its last token's."""
    longest = max(map(len, IDS))
    ids = np.array([[*row, *[0] * (longest - len(row))] for row in IDS])
    mask = np.array([[1] * len(row) + [0] * (longest - len(row)) for row in IDS])
    logits = session.run({"input_ids": ids, "attention_mask": mask}, adapters)["logits"]
    rows = logits if logits.ndim == 2 else [logits[row, len(own) - 1] for row, own in enumerate(IDS)]
    return [row[row > np.finfo(np.float32).min] for row in rows]


@pytest.mark.parametrize("name", ["bert-dynamic", "bert-required", "llama-kinds"])
def test_its_numbers_are_those_of_python(name, program, exports):
    session = AdapterSession(exports[name], "cpu")
    is_decoder = "llama" in name
    rows = ["gains,-,chat"] if is_decoder else ["topic,kind,topic"]
    cases = [("one", each, each) for each in (("chat", "tokens") if is_decoder else ("topic", "kind"))]
    cases += [("rows", each, [None if one == "-" else one for one in each.split(",")]) for each in rows]
    base = expected(session, None)
    for mode, names, adapters in cases:
        found = call(program, exports[name], mode, names).splitlines()
        wanted = expected(session, adapters)
        assert len(found) == len(wanted)
        for row, (line, own) in enumerate(zip(found, wanted, strict=True)):
            numbers = np.array(line.split(), np.float64)[: len(own)]
            np.testing.assert_allclose(numbers, own, atol=2e-5, err_msg=f"{mode} {names}: row {row}")
            is_base = isinstance(adapters, list) and adapters[row] is None
            assert is_base is bool(len(own) == len(base[row]) and np.abs(own - base[row]).max() < 1e-3)


def test_a_stored_default_that_it_cannot_know_is_refused_by_name(program, exports):
    message = call(program, exports["llama-kinds-required"], "one", "chat", code=3)
    assert message.startswith(
        "refused: A row brings no such tensor; its default lies where lora_export.json says [model.onnx.data: "
    )
    message = call(program, exports["llama-kinds"], "rows", "voice,chat,-", code=3)
    assert "[model.onnx.data: lm_head.weight]" in message


@pytest.mark.parametrize("mode", ["one", "rows"])
@pytest.mark.parametrize("fault", FAULTS)
def test_an_adapter_that_does_not_fit_is_refused_by_file_and_tensor(fault, mode, program, exports, own):
    folder = own(exports["bert-dynamic"])
    file = folder / "adapters" / "topic.onnx_adapter"
    damage(file, fault)
    message = call(program, folder, mode, "topic" if mode == "one" else "topic,topic,topic", code=3)
    start, tensor = FAULTS[fault]
    assert message.startswith(f"refused: {start}") and f"[{file}: " in message and tensor in message


def test_a_file_cut_anywhere_is_refused(program, exports, own):
    folder = own(exports["bert-dynamic"])
    file = folder / "adapters" / "topic.onnx_adapter"
    whole = file.read_bytes()
    for n in (0, 3, 7, 20, 100, 1000, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:n])
        message = call(program, folder, "one", "topic", code=3)
        assert message.startswith("refused: ")
        assert str(file) in message
    file.unlink()
    assert "There is no such adapter file" in call(program, folder, "one", "topic", code=3)


def test_usage_is_told(program, exports):
    assert call(program, exports["bert-dynamic"], "two", "topic", code=2).startswith("usage: lora_rows")
    assert "as many names as rows" in call(program, exports["bert-dynamic"], "rows", "topic", code=1)
