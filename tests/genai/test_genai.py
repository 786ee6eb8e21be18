"""ONNX Runtime GenAI, a client that knows nothing of this project, generates what PEFT generates."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import peft
import pytest
import torch
import transformers
from faults import FAULTS, damage
from genai_client import NEW_TOKENS, PROMPT, PYTHON, genai

from lora_export.artifact import read_manifest
from lora_export.export.plan import Request
from lora_export.pipeline import ExportOptions, export
from lora_export.quantization import Quantization
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.generate import generate

ROOT = Path(__file__).parents[2]


def greedy(model) -> list[int]:
    """Greedy generation by full forward passes in PyTorch, stopping where GenAI does: before an end token."""
    tokens = list(PROMPT)
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            best = int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
        if best == model.config.eos_token_id:
            break
        tokens.append(best)
    return tokens[len(PROMPT) :]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path, list[int], list[int]]:
    """A tiny Llama and an adapter with their greedy continuations in PEFT: (base, adapter, base's, adapter's)."""
    folder = tmp_path_factory.mktemp("genai")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=128,
        vocab_size=100,
        tie_word_embeddings=True,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    base = transformers.AutoModelForCausalLM.from_config(config).eval()
    base.save_pretrained(folder / "base")
    of_base = greedy(base)
    options = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", rank_pattern={"q_proj": 6})
    model = peft.get_peft_model(base, options).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter", of_base, greedy(model)


def test_dynamic_export_generates_with_and_without_the_adapter(trained, tmp_path):
    base, adapter, of_base, of_adapter = trained
    assert of_base != of_adapter
    export(Request(str(base), ((str(adapter), "one"),), "dynamic"), ExportOptions(tmp_path / "out"))
    assert genai(tmp_path / "out", None) == of_base
    assert genai(tmp_path / "out", tmp_path / "out/adapters/one.onnx_adapter") == of_adapter


def test_merged_export_generates_what_the_adapter_does(trained, tmp_path):
    base, adapter, _, of_adapter = trained
    export(Request(str(base), ((str(adapter), "one"),), "merge"), ExportOptions(tmp_path / "out"))
    assert genai(tmp_path / "out", None) == of_adapter


def test_the_sample_writes_what_python_does_for_the_base_and_two_adapters(exports):
    """`samples/genai.py`, token for token."""
    session = AdapterSession(exports["llama-dynamic"], "cpu")
    command = [PYTHON, ROOT / "samples" / "genai.py", exports["llama-dynamic"], " ".join(map(str, PROMPT)), "--ids"]
    done = subprocess.run([*command, "--max-new-tokens", "12"], capture_output=True, text=True, timeout=120, check=True)
    found = {}
    for line in done.stdout.splitlines():
        name, *ids = line.split()
        found[name] = list(map(int, ids))
    assert list(found) == ["[base]", "[chat]", "[code]"]
    for name, adapter in zip(found, (None, "chat", "code"), strict=True):
        assert [found[name]] == generate(session, [PROMPT], adapter, max_new_tokens=12)
    assert len({tuple(ids) for ids in found.values()}) == 3


def test_the_sample_refuses_an_export_that_genai_cannot_run(exports):
    command = [PYTHON, ROOT / "samples" / "genai.py", exports["llama-kinds-required"], "5 9", "--ids"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "has no genai_config.json" in done.stderr


@pytest.mark.parametrize("fault", [*FAULTS, None])
def test_the_sample_refuses_an_adapter_file_that_does_not_fit_by_its_tensor(exports, tmp_path, fault):
    folder = shutil.copytree(exports["llama-dynamic"], tmp_path / "out", copy_function=os.link)
    record = read_manifest(folder).adapters[0]
    file = folder / record.file
    if fault is None:
        whole = file.read_bytes()
        file.unlink()
        file.write_bytes(whole[: len(whole) // 2])
        words, tensor = "cannot be read", record.file
    else:
        shutil.copy(file, tmp_path / "copy")
        damage(tmp_path / "copy", fault)
        file.unlink()
        shutil.move(tmp_path / "copy", file)
        words, tensor = (FAULTS[fault][0].removeprefix("The adapter "), FAULTS[fault][1])
    command = [PYTHON, ROOT / "samples" / "genai.py", folder, "5 9", "--ids"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith(f"refused: {record.file} {words}") and tensor in done.stderr


def test_a_quantized_export_generates_what_our_session_does(trained, tmp_path):
    """Integers in the base, floats in the adapter: GenAI needs to know nothing of it."""
    base, adapter, _, _ = trained
    request = Request(str(base), ((str(adapter), "one"),), "dynamic", provider="cpu", quantization=Quantization(bits=8))
    export(request, ExportOptions(tmp_path / "out"))
    session = AdapterSession(tmp_path / "out", "cpu")
    ours = [generate(session, [PROMPT], name, max_new_tokens=NEW_TOKENS)[0] for name in (None, "one")]
    assert ours[0] != ours[1]
    found = [genai(tmp_path / "out", file) for file in (None, tmp_path / "out/adapters/one.onnx_adapter")]
    assert found == [list(each) for each in ours]
