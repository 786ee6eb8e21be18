"""What is compared on: files of the user, docstrings of the standard library, padded batches."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lora_export.artifact import read_manifest
from lora_export.base.tasks import Task
from lora_export.check.inputs.batcher import Batcher
from lora_export.check.inputs.examples import Example, built_in_examples, read_examples, require_classes
from lora_export.errors import InputRefused


def test_text_lines_and_json_lines(tmp_path):
    lines = tmp_path / "a.txt"
    lines.write_text("one\n\n  two  \n")
    assert [row.text_or_file for row in read_examples(lines, 9).rows] == ["one", "  two  "]
    rows = tmp_path / "a.jsonl"
    rows.write_text('{"text": "one", "label_id": 2}\n{"text": "two"}\n')
    assert read_examples(rows, 9).rows == (Example("one", 2), Example("two", None))


def test_a_class_under_another_name_and_one_that_no_head_has_are_refused(tmp_path):
    rows = tmp_path / "a.jsonl"
    rows.write_text('{"text": "one", "label_id": 2}\n{"text": "two", "label": "a word"}\n')
    examples = read_examples(rows, 9)
    for n_classes in (3, None):
        require_classes(examples, n_classes)
    with pytest.raises(InputRefused, match="none of the head's classes") as refused:
        require_classes(examples, 2)
    assert (refused.value.expected, refused.value.found) == ("label_id from 0 to 1", "2")
    rows.write_text('{"text": "one", "label": 2}\n')
    with pytest.raises(InputRefused, match="its class under another name") as refused:
        read_examples(rows, 9)
    assert (refused.value.expected, refused.value.found) == ("label_id", "label")


def test_a_limit_takes_an_even_spread(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("\n".join(str(n) for n in range(100)))
    found = read_examples(file, 4)
    assert [row.text_or_file for row in found.rows] == ["0", "25", "50", "75"]
    assert found.description == f"{file} (4 of 100 rows)"
    assert len(read_examples(file, 1000).rows) == 100


@pytest.mark.parametrize(
    "line",
    ["{", "[1]", '"text"', "3", '{"label_id": 1}', "null"],
    ids=["cut", "list", "string", "number", "no text", "null"],
)
def test_a_line_that_is_no_example_is_named(line, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(InputRefused, match="A line of the data is not an example") as refused:
        read_examples(file, 9)
    assert refused.value.where == f"{file}:2" and refused.value.found == line


def test_missing_and_empty_data_are_refused(tmp_path):
    with pytest.raises(InputRefused, match="There is no such data file"):
        read_examples(tmp_path / "no", 9)
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(InputRefused, match="The data holds no examples"):
        read_examples(tmp_path / "a.txt", 9)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputRefused, match="The data holds no examples"):
        read_examples(tmp_path / "folder", 9)


def test_data_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(InputRefused, match="The data is not UTF-8 text") as refused:
        read_examples(tmp_path / "a.txt", 9)
    assert refused.value.where == str(tmp_path / "a.txt")


def test_images_come_from_a_folder_in_order(tmp_path):
    for name in ("b.png", "a.JPG", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [row.text_or_file for row in read_examples(tmp_path, 9).rows] == [
        str(tmp_path / "a.JPG"),
        str(tmp_path / "b.png"),
    ]


def test_built_in_texts_are_the_same_every_time_and_differ_in_length():
    first, again = built_in_examples(16), built_in_examples(16)
    assert first == again and len(first.rows) == 16
    lengths = [len(row.text_or_file) for row in first.rows]
    assert lengths == sorted(lengths) and lengths[-1] > 10 * lengths[0]
    assert len({row.text_or_file for row in first.rows}) == 16


def batcher(exports, name: str, task: Task) -> Batcher:
    return Batcher(exports[name], task, read_manifest(exports[name]).contract)


def test_texts_become_padded_batches(exports):
    found = batcher(exports, "bert-merged", Task.TEXT_CLASSIFICATION).batch([Example("abc", 1), Example("a")])
    assert set(found.inputs) == {"input_ids", "attention_mask", "token_type_ids"}
    assert found.inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert found.real.tolist() == found.inputs["attention_mask"].astype(bool).tolist()
    assert not found.inputs["token_type_ids"].any() and found.labels == (1, None)
    assert {array.dtype for array in found.inputs.values()} == {np.dtype(np.int64)}


def test_decoders_get_positions_and_padding_on_the_side_asked_for(exports):
    made = batcher(exports, "llama-base", Task.TEXT_GENERATION).batch(
        [Example("abc"), Example("a")], padding_side="left"
    )
    assert made.inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert made.inputs["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    assert not any(name.startswith("past") for name in made.inputs)


@pytest.mark.parametrize(("side", "expected"), [("right", [[1, 2, -1], [-1] * 3]), ("left", [[1, 2, -1], [-1] * 3])])
def test_a_decoders_targets_are_the_tokens_that_follow(side, expected, exports):
    made = batcher(exports, "llama-base", Task.TEXT_GENERATION).batch([Example("abc"), Example("a")], padding_side=side)
    ids = made.inputs["input_ids"]
    wanted = [[-1 if place < 0 else ids[row, place] for place in places] for row, places in enumerate(expected)]
    assert made.targets.tolist() == wanted
    assert batcher(exports, "bert-merged", Task.TEXT_CLASSIFICATION).batch([Example("abc")]).targets is None


def test_long_texts_are_cut(exports):
    found = batcher(exports, "llama-base", Task.TEXT_GENERATION).batch([Example("x" * 5000)])
    assert found.inputs["input_ids"].shape == (1, 96)


def test_images_become_pixels(exports, tmp_path):
    from PIL import Image

    Image.fromarray(np.full((30, 40, 3), 200, np.uint8)).save(tmp_path / "a.png")
    made = batcher(exports, "vit-merged", Task.IMAGE_CLASSIFICATION)
    assert made.takes_images
    assert made.batch([Example(str(tmp_path / "a.png"))]).inputs["pixel_values"].shape == (1, 3, 16, 16)
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(InputRefused):
        made.batch([Example(str(tmp_path / "b.png"))])
    noise = made.noise(3).inputs["pixel_values"]
    assert noise.shape == (3, 3, 16, 16) and noise.std() == pytest.approx(1, abs=0.1)


def test_a_folder_without_a_tokenizer_is_refused(exports, own):
    folder = own(exports["bert-merged"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(InputRefused, match="has no usable tokenizer") as refused:
        Batcher(folder, Task.TEXT_CLASSIFICATION, read_manifest(folder).contract)
    assert "tokenizer files" in refused.value.next_step


def test_rows_are_batched_in_order(exports):
    made = batcher(exports, "bert-merged", Task.TEXT_CLASSIFICATION)
    examples = built_in_examples(5)
    batches = made.batches(examples, 2)
    assert [len(batch.labels) for batch in batches] == [2, 2, 1]
    json.dumps(examples.description)


@pytest.mark.parametrize(
    "line", ["9" * 5000, "[" * 100_000, '{"text": "\\ud800"}', '{"text": "x", "label_id": "one"}', "[1]", '"x"'],
    ids=["digits", "nested", "surrogate", "label", "list", "text"],
)  # fmt: skip
def test_hostile_lines_are_refused_by_number(line, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "fine"}\n' + line, encoding="utf-8")
    with pytest.raises(InputRefused, match="A line of the data is not an example") as refused:
        read_examples(path, 8)
    assert refused.value.where == f"{path}:2"
