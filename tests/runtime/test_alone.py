"""The runtime on a machine that has onnxruntime, NumPy and this package, and no other package at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy
import onnxruntime

import lora_export

CODE = """
import sys
sys.path.insert(0, sys.argv[1])
from lora_export import AdapterSession, EnvironmentUnusable
session = AdapterSession(sys.argv[2], "cpu", max_bytes=10**9)
found = session.generate([[20, 30, 40], [50]], ["chat", None], max_new_tokens=5, eos_ids=())
print([list(text.ids) for text in found])
try:
    session.generate(["a text"])
except EnvironmentUnusable as error:
    print(error.next_step)
print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "transformers", "click", "onnx", "tokenizers"}))
"""


def test_token_ids_need_nothing_else(exports, tmp_path):
    for package in (numpy, onnxruntime, lora_export):
        folder = Path(package.__file__).parent
        for each in (folder, folder.with_name(f"{folder.name}.libs")):
            if each.is_dir():
                (tmp_path / each.name).symlink_to(each)
    # Without site-packages, and without what the environment adds.
    command = [sys.executable, "-I", "-S", "-c", CODE, tmp_path, exports["llama-dynamic"]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    ids, needed, others = done.stdout.splitlines()
    expected = lora_export.AdapterSession(exports["llama-dynamic"], "cpu").generate(
        [[20, 30, 40], [50]], ["chat", None], max_new_tokens=5, eos_ids=()
    )
    assert ids == str([list(text.ids) for text in expected])
    assert needed == "pip install tokenizers, or give token ids"
    assert others == "[]"
