"""`samples/csharp`: its reader and its stacking, compiled by Mono where there is one. Nothing here compiles `Program.cs`, which calls
ONNX Runtime: its package and a .NET toolchain for it are not to be had on these machines."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from faults import FAULTS, damage
from javascript import HERE, SAMPLES

from lora_export.runtime.adapter_session import AdapterSession

ONNX_TYPES = {"float32": 1, "int64": 7, "float16": 10}
needs_mono = pytest.mark.skipif(shutil.which("mcs") is None, reason="no C# compiler is here: apt-get install mono-mcs")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("csharp") / "stack.exe"
    sources = [SAMPLES / "csharp" / "AdapterFile.cs", SAMPLES / "csharp" / "Rows.cs", HERE / "Stack.cs"]
    subprocess.run(["mcs", f"-out:{out}", "-warnaserror", *map(str, sources)], check=True, timeout=120)
    return out


def stack(program: Path, session: AdapterSession, folder: Path, rows: str, *, code: int = 0) -> str:
    lines = [
        " ".join(
            [
                entry.name,
                str(ONNX_TYPES[entry.dtype]),
                *(str(dim) if isinstance(dim, int) else "-1" for dim in entry.dims),
            ]
        )
        for entry in session.contract.adapter_inputs
    ]
    command = ["mono", str(program), str(folder), rows]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout


@needs_mono
@pytest.mark.parametrize(("name", "rows"), [("bert-dynamic", "topic,kind,topic"), ("llama-kinds", "gains,-,chat")])
def test_rows_are_stacked_as_python_does_bit_for_bit(name, rows, program, exports):
    session = AdapterSession(exports[name], "cpu")
    names = [None if row == "-" else row for row in rows.split(",")]
    expected = session.stacked(names, len(names))
    found = {}
    for line in stack(program, session, exports[name], rows).splitlines():
        key, dims, data = line.split(" ")
        found[key] = np.frombuffer(base64.b64decode(data), expected[key].dtype).reshape(list(map(int, dims.split(","))))
    # Python also stacks what is the base's in every row, such as a bias beside a gain.
    assert found and found.keys() <= expected.keys()
    for key, array in expected.items():
        wanted = array if key in found else np.zeros_like(array)
        np.testing.assert_array_equal(found.get(key, array), wanted, err_msg=key)


@needs_mono
@pytest.mark.parametrize("fault", FAULTS)
def test_an_adapter_that_does_not_fit_is_refused_by_file_and_tensor(fault, program, exports, own):
    folder, session = own(exports["bert-dynamic"]), AdapterSession(exports["bert-dynamic"], "cpu")
    file = folder / "adapters" / "topic.onnx_adapter"
    damage(file, fault)
    message = stack(program, session, folder, "topic", code=3)
    start, tensor = FAULTS[fault]
    assert message.startswith(f"refused: {start}") and f"[{file}: " in message and tensor in message
    file.write_bytes(file.read_bytes()[:500])
    message = stack(program, session, folder, "topic", code=3)
    assert message.startswith("refused: The adapter file is truncated") and str(file) in message


def test_it_calls_what_onnxruntime_s_package_has():
    """By name, in the C# sources of ONNX Runtime that `ci/setup hosts` brings."""
    sources = SAMPLES / "node_modules" / "com.github.asus4.onnxruntime" / "Runtime"
    if not sources.is_dir():
        pytest.skip("ONNX Runtime's C# sources are not here: run ci/setup hosts")
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources.rglob("*.cs"))
    program = (SAMPLES / "csharp" / "Program.cs").read_text(encoding="utf-8")
    called = set(
        re.findall(
            r"(?:session|options|OrtLoraAdapter|OrtValue|value|metadata|results\[0\]|OrtAllocator)\.([A-Z]\w+)", program
        )
    )
    called -= {"Concat", "Key", "Value", "Values", "Dispose"}
    assert {"AddActiveLoraAdapter", "OverridableInitializerMetadata", "CreateAllocatedTensorValue"} <= called
    for name in called:
        assert re.search(rf"public [^;{{}}=]*\b{name}\b", text), name
