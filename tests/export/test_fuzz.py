"""A seeded fuzz of all that is read from a user: it ends in success or in a refusal, never in a traceback.

`--fuzz 20` tries twenty times as many inputs, `--seed` other ones.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import fuzz
import pytest
from peft import LoraConfig

from lora_export.adapters.folder import open_adapter
from lora_export.adapters.support import require_supported
from lora_export.artifact import read_manifest
from lora_export.base.checkpoint import Checkpoint, Located
from lora_export.base.stored import SafetensorsFiles
from lora_export.errors import EnvironmentUnusable, InputRefused, LoraExportError
from lora_export.export.plan import Request, make_plan
from lora_export.export.resolve import resolve

PAIRS = (("llama", "chat"), ("bert", "topic"), ("t5", "t5-attention"), ("clip", "pairs"), ("vit", "sights"),
         ("gpt2", "poet"), ("whisper", "whisper-attention"))  # fmt: skip
OF_A_BASE = (
    "auto_map", "quantization_config", "num_labels", "num_hidden_layers", "torch_dtype", "pad_token_id", "rope_scaling",
    "text_config", "vision_config", "head_dim", "layer_types", "sliding_window", "encoder_layers", "depth", "id2label",
)  # fmt: skip
OF_AN_ADAPTER = tuple(LoraConfig.__dataclass_fields__)


@pytest.fixture
def attempts(request: pytest.FixtureRequest) -> Callable[[str, int], list[random.Random]]:
    """A generator for each of so many attempts."""
    factor, seed = request.config.getoption("--fuzz"), os.environ["LORA_EXPORT_TEST_SEED"]

    def make(kind: str, n: int) -> list[random.Random]:
        return [random.Random(f"{kind} {seed} {attempt}") for attempt in range(round(n * factor))]

    return make


def refused(function: Callable[[], object], what: object) -> bool:
    """Whether `function` refuses its input; what else it raises fails the test and shows the input."""
    try:
        function()
    except LoraExportError as error:
        assert isinstance(error, InputRefused | EnvironmentUnusable), error
        assert error.what and len(str(error)) < 4000
        return True
    except Exception as error:
        raise AssertionError(f"{type(error).__name__} from {what}") from error
    return False


def linked(source: Path, folder: Path, name: str) -> Path:
    """A folder with the files of `source` but `name`, which is to be written; that one's path."""
    folder.mkdir()
    for file in source.iterdir():
        if file.name != name:
            (folder / file.name).symlink_to(file)
    return folder / name


def test_adapter_configs(attempts, adapters, tmp_path):
    file = linked(adapters["code"], tmp_path / "a", "adapter_config.json")
    fields = json.loads((adapters["code"] / file.name).read_text())

    def read() -> None:
        folder = open_adapter(file.parent, "a")
        for mode in ("merge", "dynamic"):
            require_supported(folder.config, mode, "a")

    n_refused = 0
    for rng in attempts("adapter config", 1000):
        wrong = fuzz.damaged_json(fields, rng, OF_AN_ADAPTER)
        file.write_text(json.dumps(wrong))
        n_refused += refused(read, wrong)
    assert n_refused


@pytest.mark.parametrize(("name", "of"), [("adapter_model.safetensors", "chat"), ("model.safetensors", "albert")])
def test_safetensors_files(name, of, attempts, adapters, bases, tmp_path):
    source = (adapters if name.startswith("adapter") else bases)[of]
    file = linked(source, tmp_path / "a", name)
    content = (source / name).read_bytes()

    def read() -> None:
        if name.startswith("adapter"):
            open_adapter(file.parent, "a")
        else:
            files = SafetensorsFiles.open([file])
            for tensor in list(files.tensors)[:2]:
                files.read(tensor)

    n_refused = 0
    for rng in attempts(name, 1000):
        wrong = fuzz.damaged_safetensors(content, rng)
        file.write_bytes(wrong)
        n_refused += refused(read, wrong[:200])
    assert n_refused


def test_manifests(attempts, tmp_path):
    golden = Path(__file__).parents[1] / "goldens" / "manifest-1-first.json"
    fields = json.loads(golden.read_text(encoding="utf-8"))
    n_refused = 0
    for rng in attempts("manifest", 300):
        wrong = fuzz.damaged_json(fields, rng)
        (tmp_path / "lora_export.json").write_text(json.dumps(wrong))
        n_refused += refused(lambda: read_manifest(tmp_path), wrong)
    assert n_refused


@pytest.mark.parametrize(("base", "adapter"), PAIRS)
def test_base_configs(base, adapter, attempts, bases, tmp_path):
    """Layers, widths and the like are held against the headers, so that nothing large is built."""
    file = linked(bases[base], tmp_path / "b", "config.json")
    fields = json.loads((bases[base] / file.name).read_text())
    n_refused = 0
    for rng in attempts(f"config of {base}", 80):
        wrong = fuzz.damaged_json(fields, rng, OF_A_BASE)
        file.write_text(json.dumps(wrong))
        n_refused += refused(lambda: Checkpoint.open(Located(file.parent, "b")).load_config(), wrong)
    assert n_refused


def plan(request: Request) -> None:
    resolve(make_plan(request))


@pytest.mark.parametrize(("base", "adapter"), PAIRS)
def test_plans(base, adapter, attempts, bases, adapters, tmp_path):
    """Everything that is done before the trace, of an adapter or a base that is damaged."""
    for attempt, rng in enumerate(attempts(f"plan of {base}", 8)):
        paths = {"base": bases[base], "adapter": adapters[adapter]}
        damaged = rng.choice(list(paths))
        name, extra = {"base": ("config.json", OF_A_BASE), "adapter": ("adapter_config.json", OF_AN_ADAPTER)}[damaged]
        file = linked(paths[damaged], tmp_path / str(attempt), name)
        wrong = fuzz.damaged_json(json.loads((paths[damaged] / name).read_text()), rng, extra)
        file.write_text(json.dumps(wrong))
        paths[damaged] = file.parent
        request = Request(str(paths["base"]), ((str(paths["adapter"]), "a"),), rng.choice(("merge", "dynamic")))
        refused(functools.partial(plan, request), wrong)
        shutil.rmtree(file.parent)


@pytest.mark.parametrize("field", ["num_hidden_layers", "n_layer", "encoder_layers", "num_decoder_layers", "depth"])
@pytest.mark.parametrize("value", [2**63, 10**30, 10**6, -1, float("nan")])
def test_more_layers_than_tensors_are_refused_at_once(field, value, bases, tmp_path):
    file = linked(bases["bert"], tmp_path / "b", "config.json")
    fields = json.loads((bases["bert"] / file.name).read_text())
    file.write_text(json.dumps(fields | {field: value}))
    with pytest.raises(InputRefused, match="The base's config does not fit its checkpoint") as error:
        Checkpoint.open(Located(file.parent, "b"))
    assert error.value.where.endswith(f"config.json: {field}") and "39 tensors" in error.value.expected
