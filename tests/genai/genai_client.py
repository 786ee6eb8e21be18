"""ONNX Runtime GenAI as a client, in an interpreter of its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("LORA_EXPORT_GENAI_PYTHON", ROOT / ".venv-genai/bin/python"))
PROMPT, NEW_TOKENS = [5, 9, 17, 33, 12, 8], 20

CLIENT = """
import json, sys
import onnxruntime_genai as og

folder, adapter, prompt, n_new = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
model = og.Model(folder)
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=len(prompt) + n_new, do_sample=False)
generator = og.Generator(model, parameters)
if adapter:
    adapters = og.Adapters(model)
    adapters.load(adapter, "one")
    generator.set_active_adapter(adapters, "one")
generator.append_tokens([prompt])
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps(generator.get_sequence(0).tolist()[len(prompt):]))
"""


def genai(folder: Path, adapter: Path | None) -> list[int]:
    """What GenAI generates greedily, in its own interpreter."""
    assert PYTHON.exists(), f"{PYTHON} is missing: run ci/setup genai"
    command = [PYTHON, "-c", CLIENT, folder, adapter or "", json.dumps(PROMPT), str(NEW_TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env={"PATH": os.environ["PATH"]})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])
