"""A model of texts and images (CLIP): both halves of a row are compared, and the scores across rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from references import pixels, text, unmerged

from lora_export.check.context import CheckOptions, main_outputs
from lora_export.errors import UsageProblem
from lora_export.integrity.sources import SourceOverrides
from lora_export.pipeline import check
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.trial import run_trial
from lora_export.verdict import Verdict

OUTPUTS = ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds")


def inputs(n_texts: int, n_images: int) -> dict[str, np.ndarray]:
    return text(n_texts, 9, token_types=False) | pixels(n_images)


def truth(base: Path, adapters: list[Path], feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    model = unmerged(base, "CLIPModel", adapters)
    with torch.no_grad():
        found = model(**{name: torch.from_numpy(array) for name, array in feeds.items()})
    return {name: found[name].numpy() for name in OUTPUTS}


@pytest.mark.parametrize("name", ["clip-dynamic", "clip-merged"])
@pytest.mark.parametrize(("n_texts", "n_images"), [(5, 1), (1, 4), (3, 3)])
def test_texts_and_images_differ_in_number(name, n_texts, n_images, exports, bases, adapters):
    feeds = inputs(n_texts, n_images)
    found = AdapterSession(exports[name], "cpu").run(feeds, "pairs" if "dynamic" in name else None)
    assert set(found) == set(OUTPUTS)
    for output, expected in truth(bases["clip"], [adapters["pairs"]], feeds).items():
        np.testing.assert_allclose(found[output], expected, atol=2e-5, err_msg=output)


def test_rows_have_adapters_of_their_own_in_both_halves(exports, bases, adapters):
    feeds, rows = inputs(4, 4), ["pairs", None, "styles", "pairs"]
    found = AdapterSession(exports["clip-dynamic"], "cpu").run(feeds, rows)
    for row, name in enumerate(rows):
        expected = truth(bases["clip"], [adapters[name]] if name else [], feeds)
        for output in ("text_embeds", "image_embeds"):
            np.testing.assert_allclose(found[output][row], expected[output][row], atol=2e-6, err_msg=output)
    apart = truth(bases["clip"], [], feeds)
    assert np.abs(found["image_embeds"][2] - apart["image_embeds"][2]).max() > 0.01


def test_adapters_by_row_need_as_many_images_as_texts(exports):
    session = AdapterSession(exports["clip-dynamic"], "cpu")
    with pytest.raises(UsageProblem, match="need as many rows in every input") as refused:
        session.run(inputs(3, 1), ["pairs", None, "styles"])
    assert "input_ids: 3" in refused.value.found and "pixel_values: 1" in refused.value.found
    assert session.run(inputs(3, 1), ["pairs"] * 3)["logits_per_image"].shape == (1, 3)


@pytest.mark.parametrize("name", ["clip-dynamic", "clip-merged"])
def test_a_sound_export_passes(name, exports, own):
    report, _ = check(own(exports[name]), SourceOverrides(), CheckOptions(provider="cpu"))
    assert report.verdict is Verdict.PASS, [(case.name, case.failures) for case in report.cases if case.failures]
    assert any(case.name == "pairs: texts for an image" for case in report.cases)


def scale_output(folder: Path, name: str, factor: float) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    graph = model.graph
    node = next(node for node in graph.node if name in node.output)
    node.output[list(node.output).index(name)] = "unscaled"
    for other in graph.node:
        other.input[:] = ["unscaled" if used == name else used for used in other.input]
    graph.initializer.append(onnx.numpy_helper.from_array(np.float32(factor), "factor"))
    at = list(graph.node).index(node) + 1
    graph.node.insert(at, onnx.helper.make_node("Mul", ["unscaled", "factor"], [name]))
    onnx.save(model, folder / "model.onnx")


@pytest.mark.parametrize(
    ("output", "caught_in"),
    [
        ("logits_per_image", {"pairs: texts for an image", "styles: texts for an image", "base: texts for an image"}),
        ("image_embeds", {"pairs", "styles", "base", "8 mixed rows"}),
        ("text_embeds", {"pairs", "styles", "base", "8 mixed rows"}),
    ],
)
def test_each_wrong_output_is_caught(output, caught_in, exports, own):
    folder = own(exports["clip-dynamic"])
    scale_output(folder, output, 1.01)
    report, _ = check(folder, SourceOverrides(), CheckOptions(provider="cpu"))
    failed = {case.name for case in report.cases if not case.passed}
    assert caught_in <= failed


def test_what_rows_are_compared_by():
    assert main_outputs(["logits_per_image", "logits_per_text", *OUTPUTS[2:]]) == ("text_embeds", "image_embeds")
    assert main_outputs(["image_embeds", "last_hidden_state"]) == ("image_embeds",)
    assert main_outputs(["logits", "present.0.key"]) == ("logits",)
    assert main_outputs(["last_hidden_state", "pooler_output"]) == ("last_hidden_state",)


def test_a_trial_refuses_to_make_up_images(exports):
    with pytest.raises(UsageProblem, match="takes texts or images, and this graph takes both"):
        run_trial(exports["clip-merged"], ["a cat"], {}, provider="cpu", max_new_tokens=4)
