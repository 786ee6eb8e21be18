"""The list of a fleet: every format, and what is no list."""

from __future__ import annotations

import json

import pytest

from lora_export.errors import InputRefused, UsageProblem
from lora_export.fleet.roster import Entry, read_roster


def write(folder, name: str, text: str):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_csv_and_json_lines_give_the_same_entries(tmp_path):
    (tmp_path / "a").mkdir()
    table = write(tmp_path, "list.csv", "path,name,revision,data\na,,,\norg/b,bee,v2,texts.txt\ns3://bucket/c/,,,\n")
    rows = [
        {"path": "a"},
        {"path": "org/b", "name": "bee", "revision": "v2", "data": "texts.txt"},
        {"path": "s3://bucket/c/"},
    ]
    lines = write(tmp_path, "list.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    found = read_roster(table)
    assert found == (
        Entry("a", str(tmp_path / "a"), f"{table}:2"),
        Entry("bee", "org/b@v2", f"{table}:3", str(tmp_path / "texts.txt")),
        Entry("c", "s3://bucket/c/", f"{table}:4"),
    )
    assert [(e.name, e.given, e.data) for e in read_roster(lines)] == [(e.name, e.given, e.data) for e in found]
    assert [entry.is_address for entry in found] == [False, False, True]


def test_a_folder_lists_its_adapters(tmp_path, adapters):
    for name in ("chat", "code"):
        (tmp_path / name).symlink_to(adapters[name])
    (tmp_path / "no-adapter").mkdir()
    assert [(entry.name, entry.given) for entry in read_roster(tmp_path)] == [
        (name, str(adapters[name].resolve())) for name in ("chat", "code")
    ]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("list.csv", "path,name\n", "The list holds no adapters"),
        ("list.csv", "adapter\na\n", "A row of the list is no adapter"),
        ("list.csv", "path,rank\na,3\n", "unknown: rank"),
        ("list.jsonl", '{"path": 3}\n', "A row of the list is no adapter"),
        ("list.jsonl", "[1]\n", "A row of the list is no adapter"),
        ("list.jsonl", "{\n", "The list of adapters cannot be read"),
        ("list.csv", "path,name\na,../b\n", "An adapter's name becomes a file name"),
        ("list.txt", "a\n", "has a suffix that is not read"),
    ],
)
def test_what_is_no_list_is_refused(name, text, said, tmp_path):
    with pytest.raises(InputRefused, match=said):
        read_roster(write(tmp_path, name, text))


def test_no_list_at_all_and_equal_names(tmp_path):
    with pytest.raises(InputRefused, match="There is no such list of adapters"):
        read_roster(tmp_path / "nowhere.csv")
    with pytest.raises(UsageProblem, match="have the same name") as raised:
        read_roster(write(tmp_path, "list.csv", "path\nx/a\ny/a\nb\n"))
    assert raised.value.where == f"a ({tmp_path}/list.csv:2, {tmp_path}/list.csv:3)"
