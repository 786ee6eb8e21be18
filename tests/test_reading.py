"""JSON that others made: what Python reads of it, and what is refused with the file's name."""

from __future__ import annotations

import pytest

from lora_export.errors import InputRefused
from lora_export.reading import (
    is_file,
    is_folder,
    is_there,
    json_of,
    model_settings,
    read_json,
    size_in,
    tokens_in,
    vocabulary_size,
)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b"\xff{}", "can't decode byte 0xff"),
        (b"{", "Expecting property name"),
        (b"[]", "list"),
    ],
)
def test_what_is_no_object_is_refused_by_the_file_s_name(content, found, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    for read in (read_json, lambda path: model_settings(path.parent)):
        with pytest.raises(InputRefused) as refused:
            read(path)
        assert refused.value.where == str(path) and found in refused.value.found


def test_whole_pairs_of_surrogates_are_text():
    assert json_of('{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}


def test_a_part_for_text_goes_before_the_whole(tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 3, "a": 1, "text_config": {"vocab_size": 7}}')
    assert model_settings(tmp_path)["vocab_size"] == 7 == vocabulary_size(tmp_path)
    assert model_settings(tmp_path / "none") == {}


@pytest.mark.parametrize("value", ["7", 7.5, -7, True, [7]])
def test_a_size_is_a_whole_number(value):
    assert size_in({"a": None, "b": 7}, "a", "b", where="here") == 7
    with pytest.raises(InputRefused, match="is not what it should be") as refused:
        size_in({"a": value}, "a", where="here")
    assert (refused.value.where, refused.value.found) == ("here: a", repr(value))


def test_tokens_are_one_or_several():
    assert [tokens_in({"a": value}, "a", "here") for value in (None, 3, [3, 4], [])] == [(), (3,), (3, 4), ()]
    for value in ("x", {"x": 1}, [1, "x"], True):
        with pytest.raises(InputRefused, match="is not what it should be"):
            tokens_in({"a": value}, "a", "here")


def test_a_name_that_no_file_can_have_is_no_file(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for name in ("a" * 300, "loop", "loop/x", "x\0"):
        assert not any(question(tmp_path / name) for question in (is_file, is_folder, is_there))
    for name in ("a" * 300, "loop"):
        with pytest.raises(InputRefused, match="is missing"):
            read_json(tmp_path / name)
    assert is_folder(tmp_path) and is_there(tmp_path) and not is_file(tmp_path)
