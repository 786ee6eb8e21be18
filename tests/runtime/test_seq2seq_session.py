"""`Seq2SeqSession`: greedy targets, adapters in files, and what it refuses."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import transformers
from tiny import VOCABULARY

from lora_export.errors import InputRefused, UsageProblem
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.seq2seq_session import Seq2SeqSession, open_export


@pytest.fixture(scope="module")
def session(exports) -> Seq2SeqSession:
    return Seq2SeqSession(exports["bart-dynamic"], "cpu")


def sources(rows: int = 3, length: int = 11) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    mask = np.array([[1] * (length - 2 * row) + [0] * 2 * row for row in range(rows)], np.int64)
    return {"input_ids": rng.integers(4, VOCABULARY, (rows, length)) * mask, "attention_mask": mask}


def by_full_passes(session: Seq2SeqSession, row: int, adapter, start: list[int], n: int) -> list[int]:
    """Greedy without a cache: the whole target again for each token, the row alone, unpadded."""
    inputs = {name: value[row : row + 1, : 11 - 2 * row] for name, value in sources().items()}
    tokens = list(start)
    for _ in range(n):
        logits = session.run(inputs | {"decoder_input_ids": np.array([tokens])}, adapter)["logits"]
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(start) :]


def test_each_row_writes_what_it_writes_alone(session):
    rows = ["bart-attention", None, {"bart-attention": 0.5, "bart-all": 0.5}]
    assert session.start_ids == (2,) and session.eos_ids == {2}
    found = session.generate(sources(), rows, max_new_tokens=8, eos_ids=frozenset())
    expected = [by_full_passes(session, row, adapter, [2], 8) for row, adapter in enumerate(rows)]
    assert found == expected and len({tuple(tokens) for tokens in found}) == 3


def test_transformers_generates_the_same(session, bases):
    model = transformers.BartForConditionalGeneration.from_pretrained(bases["bart"]).eval()
    inputs = sources()
    import torch

    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    options = {
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "do_sample": False,
        "num_beams": 1,
        "forced_eos_token_id": None,
    }
    expected = model.generate(**tensors, **options)[:, 1:].tolist()
    found = session.generate(inputs, max_new_tokens=8)
    assert [row[: len(mine)] for row, mine in zip(expected, found, strict=True)] == found


def test_a_row_ends_at_its_end_token_and_leaves_it_out(session):
    free = session.generate(sources(), max_new_tokens=8, eos_ids=frozenset())
    end = free[0][3]
    expected = [row[: row.index(end)] if end in row else row for row in free]
    assert session.generate(sources(), max_new_tokens=8, eos_ids=frozenset({end})) == expected


def test_a_target_may_start_with_more_than_one_token(session):
    found = session.generate(sources(), max_new_tokens=4, start_ids=[2, 50, 60], eos_ids=frozenset())
    assert found == [by_full_passes(session, row, None, [2, 50, 60], 4) for row in range(3)]


def test_how_a_target_starts_is_read_from_the_configuration(exports, own):
    folder = own(exports["bart-merged"])
    (folder / "generation_config.json").write_text('{"forced_bos_token_id": 1, "eos_token_id": [5, 6]}')
    changed = Seq2SeqSession(folder, "cpu")
    assert changed.start_ids == (2, 1) and changed.eos_ids == {5, 6}
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text("{}")
    with pytest.raises(UsageProblem, match="Nothing says how a target starts") as refused:
        Seq2SeqSession(folder, "cpu").generate(sources(), max_new_tokens=1)
    assert "start_ids" in refused.value.next_step


def test_speech_is_written_down(exports):
    session = Seq2SeqSession(exports["whisper-dynamic"], "cpu")
    features = np.random.default_rng(3).standard_normal((2, 8, 100)).astype(np.float32)
    found = session.generate({"input_features": features}, ["whisper-all", None], max_new_tokens=5, eos_ids=frozenset())
    for row, adapter in enumerate(["whisper-all", None]):
        tokens = [1]
        for _ in range(5):
            inputs = {"input_features": features[row : row + 1], "decoder_input_ids": np.array([tokens])}
            tokens.append(int(session.run(inputs, adapter)["logits"][0, -1].argmax()))
        assert found[row] == tokens[1:]


def test_adapters_are_loaded_and_unloaded(exports, own):
    folder = own(exports["t5-head-dynamic"])
    session = Seq2SeqSession(folder, "cpu")
    inputs = sources() | {"decoder_input_ids": np.array([[0, 9], [0, 8], [0, 7]])}
    expected = {name: session.run(inputs, name)["logits"] for name in ("t5-head", "t5-encoder")}
    assert session.adapters == ("t5-head", "t5-encoder")
    for name, values in expected.items():
        session.unload(name)
        with pytest.raises(UsageProblem, match=f"No adapter '{name}' is loaded"):
            session.run(inputs, name)
        assert session.load(folder / "adapters" / name, f"{name} again") == f"{name} again"
        np.testing.assert_array_equal(session.run(inputs, f"{name} again")["logits"], values)
    assert session.load(folder / "adapters" / "t5-head") == "t5-head"
    assert np.abs(expected["t5-head"] - session.run(inputs)["logits"]).max() > 0.05


def test_files_that_are_not_there_or_not_whole_are_refused(exports, tmp_path):
    session = Seq2SeqSession(exports["t5-head-dynamic"], "cpu")
    with pytest.raises(InputRefused, match="There is no such adapter") as refused:
        session.load(tmp_path / "legal")
    assert "legal.encoder_model.onnx_adapter" in refused.value.expected
    graph = "decoder_model"
    shutil.copy(exports["t5-head-dynamic"] / "adapters" / f"t5-head.{graph}.onnx_adapter", tmp_path)
    with pytest.raises(InputRefused, match="files do not belong together") as refused:
        session.load(tmp_path / "t5-head")
    assert refused.value.where == f"{tmp_path / 't5-head'}: decoder_with_past_model"
    assert "lm_head.lora_A.weight" in refused.value.expected


def test_a_file_that_changed_is_refused(exports, own):
    folder = own(exports["t5-head-dynamic"])
    adapter = ort.AdapterFormat()
    adapter.set_parameters({"x": ort.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32))})
    adapter.export_adapter(str(folder / "adapters" / "t5-head.decoder_with_past_model.onnx_adapter"))
    with pytest.raises(InputRefused, match="An adapter file is not the one that was exported"):
        Seq2SeqSession(folder, "cpu")


def test_inputs_that_are_not_the_graphs_are_refused(session):
    with pytest.raises(UsageProblem, match="lack the targets") as refused:
        session.run(sources())
    assert refused.value.expected == "input_ids, attention_mask, decoder_input_ids"
    with pytest.raises(UsageProblem, match="The inputs are not those of the graph"):
        session.run({"input_ids": sources()["input_ids"], "decoder_input_ids": np.ones((3, 2), np.int64)})
    with pytest.raises(UsageProblem, match="must have one entry for each row"):
        session.generate(sources(), [None, None], max_new_tokens=1)


def test_the_session_that_fits_is_opened(exports):
    assert isinstance(open_export(exports["bart-merged"], "cpu"), Seq2SeqSession)
    assert isinstance(open_export(exports["vit-merged"], "cpu"), AdapterSession)


def test_neither_torch_nor_transformers_is_needed(exports):
    code = f"""
import sys
for name in ("torch", "transformers", "peft", "onnx", "onnx_ir"):
    sys.modules[name] = None
import numpy as np
from lora_export import Seq2SeqSession
session = Seq2SeqSession({str(exports["bart-dynamic"])!r}, "cpu")
inputs = {{"input_ids": np.array([[5, 6, 7]]), "attention_mask": np.ones((1, 3), np.int64)}}
print(len(session.generate(inputs, "bart-all", max_new_tokens=4, eos_ids=frozenset())[0]))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )
    assert result.stdout.strip() == "4", result.stderr
