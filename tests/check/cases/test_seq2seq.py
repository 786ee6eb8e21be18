"""`check` on encoder-decoders: sound exports pass every case, and an adapter gone from one graph is caught."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from lora_export.artifact import read_manifest, sha256_of
from lora_export.check.context import CheckOptions
from lora_export.check.inputs.examples import Example, built_in_examples
from lora_export.check.inputs.seq2seq_examples import Seq2SeqBatcher
from lora_export.check.results import CheckReport
from lora_export.errors import InputRefused
from lora_export.integrity.sources import SourceOverrides
from lora_export.pipeline import check
from lora_export.verdict import Verdict


def checked(folder: Path, **options: object) -> CheckReport:
    return check(folder, SourceOverrides(), CheckOptions(provider="cpu", **options))[0]


@pytest.mark.parametrize("base", ["t5", "bart", "whisper"])
def test_sound_exports_pass_every_case(base, exports, own):
    report = checked(own(exports[f"{base}-dynamic"]), merged=exports[f"{base}-merged"])
    assert report.verdict is Verdict.PASS, [(case.name, case.failures) for case in report.cases if case.failures]
    first, second = f"{base}-attention", f"{base}-all"
    decoding = [f"{name}: {what}" for name in (first, second) for what in ("cached steps", "32 greedy tokens")]
    if base != "whisper":
        decoding += [f"{name}: padded on the left" for name in (first, second)]
    rows = ["8 mixed rows", "8 mixed rows alone", f"{first} → {second} → {first} → none"]
    assert {case.name for case in report.cases} == {first, second, "base", *rows, f"merged {second}", *decoding}
    for case in report.cases:
        assert case.group != "adapter" or not case.measured("effect_share").failed
        assert not (case.value("error", "features") or 0) > 2e-5, case.name
    noise = any("spectrograms" in line for line in report.data)
    assert noise == (base == "whisper")


def test_a_merged_export_passes_too(exports, own):
    report = checked(own(exports["t5-head-merged"]))
    assert report.verdict is Verdict.PASS
    assert {case.group for case in report.cases} == {"adapter", "decoding"}


def change(folder: Path, name: str, graph: str, how: Callable[[str, np.ndarray], np.ndarray]) -> None:
    """Rewrite an adapter's file for one graph, and its hash, as if the packing itself had been wrong."""
    file = f"adapters/{name}.{graph}.onnx_adapter"
    read = ort.AdapterFormat.read_adapter(str(folder / file))
    values = {key: how(key, value.numpy().copy()) for key, value in read.get_parameters().items()}
    adapter = ort.AdapterFormat()
    adapter.set_parameters({key: ort.OrtValue.ortvalue_from_numpy(value) for key, value in values.items()})
    adapter.export_adapter(str(folder / file))
    manifest = json.loads((folder / "lora_export.json").read_text())
    manifest["files"][file] = sha256_of(folder / file)
    (folder / "lora_export.json").write_text(json.dumps(manifest))


def no_effect(key: str, value: np.ndarray) -> np.ndarray:
    return np.zeros_like(value)


def no_effect_on_cross_attention(key: str, value: np.ndarray) -> np.ndarray:
    return np.zeros_like(value) if "EncDecAttention.v" in key else value


@pytest.mark.parametrize(
    ("graph", "how", "caught"),
    [
        ("encoder_model", no_effect, {"t5-attention", "t5-attention: 32 greedy tokens", "8 mixed rows"}),
        ("decoder_model", no_effect_on_cross_attention, {"t5-attention", "t5-attention: cached steps"}),
        ("decoder_with_past_model", no_effect, {"t5-attention: cached steps"}),
    ],
)
def test_an_adapter_gone_from_one_graph_is_caught(graph, how, caught, exports, own):
    folder = own(exports["t5-dynamic"])
    change(folder, "t5-attention", graph, how)
    report = checked(folder)
    failed = {case.name for case in report.cases if not case.passed}
    assert caught <= failed, failed
    assert not any(name.startswith(("t5-all", "base")) for name in failed)


def batcher(exports, name: str) -> Seq2SeqBatcher:
    return Seq2SeqBatcher(exports[name], read_manifest(exports[name]))


def test_a_text_is_its_own_target(exports):
    found = batcher(exports, "t5-merged").batch([Example("abc", 1), Example("a")], padding_side="left")
    ids, targets = found.inputs["input_ids"], found.inputs["decoder_input_ids"]
    assert found.inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    # The start token 0, then the text with its specials; padding (0) on the right.
    assert targets[0].tolist() == [0, *ids[0]] and targets[1].tolist() == [0, *ids[1, 2:], 0, 0]
    assert found.real.tolist() == [[True] * 6, [True] * 4 + [False] * 2]
    assert found.labels == (1, None)
    with pytest.raises(InputRefused, match="An encoder-decoder takes one text a row"):
        batcher(exports, "t5-merged").batch([Example("abc", None, "b")])
    assert [len(batch.labels) for batch in batcher(exports, "t5-merged").batches(built_in_examples(5), 2)] == [2, 2, 1]


def test_long_sources_and_targets_are_cut(exports):
    found = batcher(exports, "bart-merged").batch([Example("x" * 5000)]).inputs
    assert (found["input_ids"].shape, found["decoder_input_ids"].shape) == ((1, 96), (1, 48))


def test_speech_is_noise(exports):
    made = batcher(exports, "whisper-merged")
    assert not made.takes_text
    found = made.noise(3)
    assert found.inputs["input_features"].shape == (3, 8, 100) and found.inputs["input_features"].std() > 0.9
    assert found.inputs["decoder_input_ids"].shape == found.real.shape == (3, 24) and found.real.all()
    assert (found.inputs["decoder_input_ids"][:, 0] == 1).all()
    with pytest.raises(InputRefused, match="Data for a speech export is not read"):
        made.batch([Example("a.wav")])
