"""A seeded fuzz of plans, made of a damaged base or adapter: success or a refusal, never a traceback.

What reads single files is fuzzed in tests/ci/test_fuzz_inputs.py. `--fuzz 20` tries twenty times as many inputs, `--seed` other ones.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
from collections.abc import Callable

import pytest
from fuzzing.kinds import OF_A_BASE
from fuzzing.mutations import damaged_json
from fuzzing.subjects import linked
from peft import LoraConfig

from lora_export.base.checkpoint import Checkpoint, Located
from lora_export.errors import EnvironmentUnusable, InputRefused, LoraExportError
from lora_export.export.plan import Request, make_plan
from lora_export.export.resolve import resolve

PAIRS = (("llama", "chat"), ("bert", "topic"), ("t5", "t5-attention"), ("clip", "pairs"), ("vit", "sights"),
         ("gpt2", "poet"), ("whisper", "whisper-attention"))  # fmt: skip
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
        wrong = damaged_json(json.loads((paths[damaged] / name).read_text()), rng, extra)
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
