"""Rank and scale that stand only in a file's header are read, by every way of writing them, and refused on conflict."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_export.adapters.header import KEY, HeaderOptions
from lora_export.errors import InputRefused
from lora_export.export.plan import Request, make_plan
from lora_export.export.resolve import resolve

QUERY, VALUE = (f"encoder.layer.1.attention.self.{name}" for name in ("query", "value"))


def header(options: dict | None = None, **more: str) -> HeaderOptions:
    given = {} if options is None else {KEY: json.dumps(options)}
    return HeaderOptions.of(Path("mine.safetensors"), given | more)


def written(folder: Path, metadata: dict, prefix: str = "", alpha: float | None = None) -> Path:
    """Pairs of rank 4 on two modules of the tiny BERT, without a config."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for module in (QUERY, VALUE):
        tensors[f"{prefix}{module}.lora_A.weight"] = torch.randn(4, 32, generator=generator)
        tensors[f"{prefix}{module}.lora_B.weight"] = torch.randn(32, 4, generator=generator)
        if alpha is not None:
            tensors[f"{prefix}{module}.alpha"] = torch.tensor(alpha)
    folder.mkdir()
    save_file(tensors, folder / "mine.safetensors", metadata={"format": "pt"} | metadata)
    return folder / "mine.safetensors"


def scales(bases, file: Path) -> dict[str, float]:
    plan = make_plan(Request(str(bases["bert"]), ((str(file), None),), "merge"))
    return {module: pair.scale for module, pair in resolve(plan).adapters[0].lora.items()}


@pytest.mark.parametrize(
    ("options", "prefix", "expected"),
    [
        ({"r": 4, "lora_alpha": 16}, "", {QUERY: 4, VALUE: 4}),
        ({"text_encoder.r": 4, "text_encoder.lora_alpha": 2}, "text_encoder.", {QUERY: 0.5, VALUE: 0.5}),
        ({"text_encoder.r": 4, "text_encoder.lora_alpha": 2}, "", {QUERY: 0.5, VALUE: 0.5}),
        ({"r": 4, "lora_alpha": 16, "use_rslora": True}, "", {QUERY: 8, VALUE: 8}),
        ({"r": 4, "lora_alpha": 16, "alpha_pattern": {"query": 2}}, "", {QUERY: 0.5, VALUE: 4}),
        ({"r": 8, "lora_alpha": 16, "rank_pattern": {"layer.1.attention.self": 9, "query": 4, "value": 4}}, "", {QUERY: 4, VALUE: 4}),
        ({"r": 4, "lora_alpha": 16, "target_modules": ["query", "value"], "peft_type": "LORA", "bias": "none"}, "", {QUERY: 4, VALUE: 4}),
        ({"target_modules": ["query"]}, "", {QUERY: 1, VALUE: 1}),
    ],
)  # fmt: skip
def test_the_scale_is_the_header_s(options, prefix, expected, bases, tmp_path):
    file = written(tmp_path / "mine", {KEY: json.dumps(options)}, prefix)
    assert scales(bases, file) == pytest.approx(expected)


def test_kohya_s_own_header_counts_where_no_alpha_is_stored(bases, tmp_path):
    said = {"ss_network_dim": "4", "ss_network_alpha": "2.0"}
    assert scales(bases, written(tmp_path / "silent", said)) == pytest.approx({QUERY: 0.5, VALUE: 0.5})
    # A pair's own alpha may differ by module, so it goes first.
    assert scales(bases, written(tmp_path / "stored", said, alpha=12.0)) == pytest.approx({QUERY: 3, VALUE: 3})
    assert header(ss_network_dim="None", ss_network_alpha="None").kohya is None


def test_without_a_header_the_scale_is_the_format_s(bases, tmp_path):
    assert scales(bases, written(tmp_path / "mine", {})) == {QUERY: 1, VALUE: 1}


@pytest.mark.parametrize(
    ("metadata", "alpha", "what", "found"),
    [
        ({KEY: '{"r": 8, "lora_alpha": 16}'}, None, "do not fit its tensors", "8 in the header, 4 in the tensors"),
        ({"ss_network_dim": "8", "ss_network_alpha": "2"}, None, "do not fit its tensors", "8 in the header"),
        ({KEY: '{"r": 4, "lora_alpha": 16}'}, 4.0, "another than the tensor's", "4"),
        ({KEY: '{"a.r": 4, "a.lora_alpha": 16, "b.r": 4, "b.lora_alpha": 8}'}, None, "do not fit", "options of a, b"),
        ({KEY: '{"r": 4, "lora_alpha": "much"}'}, None, "is no number", "'much'"),
        ({KEY: '{"r": 4, "lora_alpha": NaN}'}, None, "is no number", "nan"),
        ({KEY: '{"r": 4, "lora_alpha": 4, "alpha_pattern": 5}'}, None, "is not what it should be", "5"),
        ({KEY: '{"r": 4, "lora_alpha": 4, "x.rank_pattern": "q"}'}, None, "is not what it should be", "'q'"),
        ({KEY: "[4]"}, None, "holds no JSON object", "[4]"),
        ({KEY: "{"}, None, "not valid JSON", "Expecting"),
        ({KEY: '{"r": 4, "lora_alpha": 16, "use_dora": true}'}, None, "read from adapter_config.json only", "use_dora"),
        ({KEY: '{"r": 4, "lora_alpha": 16, "new_thing": 1}'}, None, "does not know", "new_thing"),
    ],
)  # fmt: skip
def test_a_header_that_cannot_be_followed_is_refused(metadata, alpha, what, found, bases, tmp_path):
    file = written(tmp_path / "mine", metadata, alpha=alpha)
    with pytest.raises(InputRefused, match=what) as refused:
        make_plan(Request(str(bases["bert"]), ((str(file), None),), "merge"))
    assert found in refused.value.found


def test_a_start_that_changed_the_base_is_the_header_s_too():
    assert header({"init_lora_weights": "pissa"}).start == "pissa"
    assert header().start is True and header({"r": 4}).start is True
    with pytest.raises(InputRefused, match="do not fit its tensors"):
        _ = header({"a.init_lora_weights": "pissa", "b.r": 4}).start


def test_rslora_is_alpha_over_the_root_of_the_rank():
    assert header({"lora_alpha": 6, "use_rslora": True}).alpha("query", 9, has_own=False) / 9 == pytest.approx(
        6 / math.sqrt(9)
    )


@pytest.mark.parametrize("key", ["lora_alpha", "unet.lora_alpha"])
def test_a_peft_adapter_whose_header_contradicts_its_config_is_refused(key, bases, adapters, tmp_path):
    folder = Path(shutil.copytree(adapters["chat"], tmp_path / "chat"))
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={KEY: json.dumps({key: 16})})
    with pytest.raises(InputRefused, match="the header of its weights disagree") as refused:
        make_plan(Request(str(bases["llama"]), ((str(folder), None),), "merge"))
    assert (refused.value.expected, refused.value.found) == ("lora_alpha = 8", "lora_alpha = 16")
    save_file(load_file(file), file, metadata={KEY: json.dumps({key: 8})})
    assert make_plan(Request(str(bases["llama"]), ((str(folder), None),), "merge")).folders[0].name == "chat"


@pytest.mark.parametrize(("name", "value", "usual"), [("lora_alpha", 16, 8), ("use_rslora", True, False)])
def test_a_header_counts_against_what_peft_takes_where_the_config_is_silent(
    name, value, usual, bases, adapters, tmp_path
):
    folder = Path(shutil.copytree(adapters["chat"], tmp_path / "chat"))
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    fields = json.loads(config.read_text())
    del fields[name]
    config.write_text(json.dumps(fields))
    save_file(load_file(file), file, metadata={KEY: json.dumps({name: value})})
    with pytest.raises(InputRefused, match="the header of its weights disagree") as refused:
        make_plan(Request(str(bases["llama"]), ((str(folder), None),), "merge"))
    assert (refused.value.expected, refused.value.found) == (f"{name} = {usual}", f"{name} = {value}")


@pytest.mark.parametrize("dim", ["Dynamic", "8", "32"])
def test_kohya_s_header_says_nothing_of_pairs_with_an_alpha_of_their_own(dim, bases, tmp_path):
    """sd-scripts' resize_lora.py writes "Dynamic" for both; other trainers give some modules another rank."""
    said = {"ss_network_dim": dim, "ss_network_alpha": dim}
    assert scales(bases, written(tmp_path / "stored", said, alpha=12.0)) == pytest.approx({QUERY: 3, VALUE: 3})
    with pytest.raises(InputRefused, match="is no number" if dim == "Dynamic" else "do not fit its tensors"):
        scales(bases, written(tmp_path / "silent", said))


@pytest.mark.parametrize("ranks", [{"a.rank_pattern": {}, "b.rank_pattern": {"q_proj": 2}}, {}])
def test_of_several_components_one_must_have_the_config_s_options(ranks):
    options = {"a.r": 4, "a.lora_alpha": 16, "b.r": 4, "b.lora_alpha": 8} | ranks
    header(options).require_agreement({"r": 4, "lora_alpha": 16})
    with pytest.raises(InputRefused, match="the header of its weights disagree") as refused:
        header(options).require_agreement({"r": 4, "lora_alpha": 32})
    assert refused.value.expected.startswith("lora_alpha = 32")
    assert refused.value.found.startswith("a.lora_alpha = 16, b.lora_alpha = 8")


def test_patterns_of_a_component_are_read():
    options = {"te.r": 4, "te.lora_alpha": 16, "te.alpha_pattern": {"query": 2}, "te.rank_pattern": {"value": 2}}
    both = header(options | {"unet.r": 8, "unet.lora_alpha": 1})
    assert both.alpha("te.layer.0.query", 4, has_own=False) == 2
    assert both.alpha("te.layer.0.value", 2, has_own=False) == 16
    assert both.alpha("unet.query", 8, has_own=False) == 1
    with pytest.raises(InputRefused, match="do not fit its tensors"):
        both.alpha("te.layer.0.value", 4, has_own=False)
