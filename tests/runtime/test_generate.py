"""Greedy generation with a cache, against full forward passes of PEFT without one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from references import unmerged
from tokenizers import Tokenizer

from lora_export.errors import UsageProblem
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.generate import empty_cache, generate, left_pad
from lora_export.runtime.host_inputs import positions_of
from lora_export.runtime.scheduler import Finish

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


# `AdapterSession.generate`.


@pytest.fixture
def assistant(exports, own):
    folder = own(exports["llama-dynamic"])
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}> ")
    return AdapterSession(folder, "cpu", n_threads=1, stop_spinning=True)


def test_texts_ids_and_messages_go_on_as_peft_has_it(assistant, bases, adapters):
    prompts = ["Open a socket", [20, 30, 40], [{"role": "user", "content": "Listen"}], "Bind"]
    names = ["chat", "code", None, "chat"]
    found = assistant.generate(prompts, names, max_new_tokens=NEW, max_rows=3)
    tokenizer = Tokenizer.from_file(str(bases["llama"] / "tokenizer.json"))
    texts = {0: "Open a socket", 2: "user: Listen\n> ", 3: "Bind"}
    models = {
        name: unmerged(bases["llama"], "LlamaForCausalLM", [adapters[name]] if name else []) for name in set(names)
    }
    for row, (each, name) in enumerate(zip(found, names, strict=True)):
        ids = tokenizer.encode(texts[row]).ids if row in texts else prompts[row]
        expected = greedy(models[name], ids)
        expected = expected[: expected.index(2)] if 2 in expected else expected
        assert list(each.ids) == expected
        assert each.text == (tokenizer.decode(expected) if row in texts else None)


def test_pieces_are_the_text(assistant):
    pieces = []
    found = assistant.generate(["Open a socket", "Bind"], "chat", max_new_tokens=NEW, stream=pieces.append)
    for index, each in enumerate(found):
        own = [piece for piece in pieces if piece.index == index]
        assert "".join(piece.text for piece in own) == each.text
        assert tuple(piece.token_id for piece in own if piece.token_id is not None) == each.ids
        assert [piece.finish for piece in own] == [None] * (len(own) - 1) + [each.finish]
    assert {each.finish for each in found} == {Finish.LENGTH, Finish.STOP}, "one has the end token"


def test_a_stop_string_ends_its_text_only(assistant):
    prompts = ["Open a socket", "Bind"]
    whole = assistant.generate(prompts, "chat", max_new_tokens=NEW)
    end = whole[0].text[5:7]
    assert end not in whole[1].text and len(whole[0].text) > 8
    first, second = assistant.generate(prompts, "chat", max_new_tokens=NEW, stop=end)
    assert first.text == whole[0].text[: whole[0].text.index(end)] and first.finish is Finish.STOP
    assert len(first.ids) < len(whole[0].ids)
    assert second == whole[1]


def test_the_end_tokens_are_those_of_the_generation_config(assistant):
    whole = assistant.generate(["Open a socket"], "chat", max_new_tokens=NEW)[0]
    (assistant.folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [999, whole.ids[6]]}))
    cut = assistant.generate(["Open a socket"], "chat", max_new_tokens=NEW)[0]
    assert cut.ids == whole.ids[: whole.ids.index(whole.ids[6])] and cut.finish is Finish.STOP
    uncut = assistant.generate(["Open a socket"], "chat", max_new_tokens=NEW, eos_ids=())[0]
    assert len(uncut.ids) == NEW and uncut.ids[: len(whole.ids)] == whole.ids


def test_what_is_asked_wrongly_is_refused(assistant):
    for ask, message in (
        (lambda: assistant.generate("one text"), "`prompts` is one text"),
        (lambda: assistant.generate(["a", "b"], ["chat"]), "`adapters` must have one entry for each row"),
        (lambda: assistant.generate([[]]), "The prompt is empty"),
        (lambda: assistant.generate([[5] * 159, [5] * 160]), "The prompt leaves no room"),
    ):
        with pytest.raises(UsageProblem, match=message):
            ask()
    assert assistant.generate([]) == []


def test_a_text_ends_at_the_model_s_last_position(assistant):
    (found,) = assistant.generate([[5] * 150], max_new_tokens=100, eos_ids=())
    assert len(found.ids) == 10 and found.finish is Finish.LENGTH
