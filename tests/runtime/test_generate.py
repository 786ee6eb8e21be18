"""Greedy generation with a cache, against full forward passes of PEFT without one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from references import unmerged

from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.generate import empty_cache, generate, left_pad
from lora_export.runtime.host_inputs import positions_of

PROMPTS = [[20, 30, 40, 50, 60, 70], [99], [120, 130, 140]]
NEW = 12


def greedy(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    tokens = list(prompt)
    for _ in range(NEW):
        with torch.no_grad():
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    ("export", "base", "model_class", "names"),
    [("llama-dynamic", "llama", "LlamaForCausalLM", ["chat", "code", None]),
     ("gpt2-dynamic", "gpt2", "GPT2LMHeadModel", ["poet", None, "poet"])],
)  # fmt: skip
def test_a_mixed_ragged_batch_equals_each_prompt_alone_without_a_cache(
    export, base, model_class, names, exports, bases, adapters
):
    session = AdapterSession(exports[export], "cpu")
    found = generate(session, PROMPTS, names, max_new_tokens=NEW)
    models = {name: unmerged(bases[base], model_class, [adapters[name]] if name else []) for name in set(names)}
    expected = [greedy(models[name], prompt) for prompt, name in zip(PROMPTS, names, strict=True)]
    assert found == expected
    assert len({tuple(row) for row in found}) > 1


def test_an_end_token_ends_its_row_only(exports):
    session = AdapterSession(exports["llama-dynamic"], "cpu")
    whole = generate(session, PROMPTS, "chat", max_new_tokens=NEW)
    end = whole[0][4]
    cut = generate(session, PROMPTS, "chat", max_new_tokens=NEW, eos_ids=frozenset({end}))
    for found, full in zip(cut, whole, strict=True):
        assert found == (full[: full.index(end)] if end in full else full)


def test_the_filler_does_not_matter(exports):
    session = AdapterSession(exports["llama-dynamic"], "cpu")
    first = generate(session, PROMPTS, "code", max_new_tokens=4, pad_id=0)
    assert generate(session, PROMPTS, "code", max_new_tokens=4, pad_id=77) == first


def test_left_padding_and_positions():
    ids, mask = left_pad([[5, 6, 7], [8]], pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert ids.dtype == mask.dtype == np.int64
    assert positions_of(mask).tolist() == [[0, 1, 2], [0, 0, 0]]
    assert positions_of(np.array([[0, 1, 1, 1]])).tolist() == [[0, 0, 1, 2]]


def test_an_empty_cache_has_the_graphs_shapes(exports):
    cache = empty_cache(AdapterSession(exports["llama-dynamic"], "cpu"), 3)
    assert {name: array.shape for name, array in cache.items()} == {
        f"past_key_values.{layer}.{part}": (3, 2, 0, 16) for layer in (0, 1) for part in ("key", "value")
    }
