"""What a user names: a mistyped path is no hub id, and another model of one owner is."""

from __future__ import annotations

import pytest

from lora_export.errors import InputRefused
from lora_export.named import ANY, holds_no, hub_out_of_reach, near, no_such, refuse_missing, require_there, what_to_do


@pytest.mark.parametrize("given", ["adapters/topcs", "adapters/topisc", "adapters/topics1"])
def test_a_letter_or_two_from_what_is_there_is_mistyped(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapters/topics").mkdir(parents=True)
    if given[-1].isdigit():
        refuse_missing(given, kind="adapter")  # another number is another adapter
        return
    with pytest.raises(InputRefused, match="The adapter is not a folder") as refused:
        refuse_missing(given, kind="adapter")
    assert "topics" in refused.value.next_step


@pytest.mark.parametrize(
    "given", ["Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen3-8B", "Qwen/Qwen2.5-1.5B@main"]
)
def test_a_hub_id_of_an_owner_whose_other_model_is_here_is_one(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen/Qwen2.5-1.5B").mkdir(parents=True)
    refuse_missing(given, kind="base")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("adapters/topcs", "adapters/topics"),
        ("adaptres/topics", "adapters/topics"),
        ("adaptres/topcs", None),  # two parts: no one knows
        ("adapters/topics", None),  # it is there
        ("adapters/k.pem", None),  # kq.py has three letters of it
        (".demo/served", None),  # what is hidden is asked for by a hidden name
        (".hidde/served", ".hidden/served"),
        ("nowhere/at/all", None),
        ("x" * 400, None),  # longer than a name can be
    ],
)
def test_a_path_with_one_mistyped_part_is_told_whole(given, meant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("adapters/topics", "adapters/kq.py", ".hidden/served"):
        (tmp_path / folder).mkdir(parents=True)
    assert near(given) == (None if meant is None else f"did you mean '{meant}'?")
    if given.startswith("ad"):
        absolute = near(tmp_path / given)
        assert absolute == (None if meant is None else f"did you mean '{tmp_path / meant}'?")


def test_what_nothing_lies_at_has_a_next_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert what_to_do("nowhere", ANY) == (
        "give the folder named with -o when exporting, the folder that PEFT's save_pretrained wrote, or a base's"
    )
    refused = no_such("image file", "a text\n" * 100)
    assert (refused.found, refused.next_step, len(refused.where)) == ("nothing at this path", "check the path", 200)
    assert hub_out_of_reach("owner/name") == "give a folder; or set HF_HOME to a cache of the hub that holds it"
    (tmp_path / "adapters/topics").mkdir(parents=True)
    assert hub_out_of_reach("adapters/kind").startswith("check the path, as adapters holds topics; or set HF_HOME")


def test_a_folder_that_holds_folders_of_its_kind_names_them(tmp_path):
    for name in ("served", "merged", "other"):
        (tmp_path / name).mkdir()
    refused = holds_no("export", tmp_path, "made.json", expected="made.json")
    assert (refused.what, refused.found) == ("The folder holds no export", "merged, other, served")
    assert refused.next_step == "give the folder named with -o when exporting"
    (tmp_path / "served/made.json").touch()
    refused = holds_no("export", tmp_path, "made.json", expected="made.json")
    assert refused.next_step == f"give one in it: {tmp_path / 'served'}"
    assert holds_no("export", tmp_path / "othr", "made.json", expected="").what == "There is no such export"
    assert holds_no("export", tmp_path / "served/made.json", expected="").found == "a file"


@pytest.mark.parametrize("given", ["~nobody-of-this-name/out", "~approx 5"])
def test_a_home_of_nobody_is_a_path_that_is_not_there(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputRefused, match="There is no such export") as refused:
        require_there("export", given)
    assert refused.value.found == "nothing at this path"


def test_a_file_or_a_folder_in_its_place_is_called_what_it_is(tmp_path):
    assert no_such("adapter file", tmp_path).found == "a folder"
