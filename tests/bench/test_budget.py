"""Allowances from a file: the most specific wins, and what means nothing is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_export.bench.budget import AGAINST, Budget, read_budget
from lora_export.errors import InputRefused

SAMPLE = Path(__file__).parents[2] / "ci/latency-budget.toml"
WHOLE = """
[ratio]
dynamic = 1.10
against = 1.02
[ratio."4x128"]
dynamic = 1.05
"mixed rows" = 1.15
[ratio."4x1@128"]
dynamic = 1.2
[swap_us]
bound = 500
[memory_mb]
dynamic = 400
[device_memory_mb]
dynamic = 900.5
"""


def written(text: str, tmp_path: Path) -> Path:
    path = tmp_path / "budget.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_most_specific_allowance_wins(tmp_path):
    budget = read_budget(written(WHOLE, tmp_path), max_ratio=1.5)
    plain, shaped, cached = (1, 32, 0), (4, 128, 0), (4, 1, 128)
    assert [budget.ratio(shape, "dynamic") for shape in (plain, shaped, cached)] == [1.10, 1.05, 1.2]
    assert [budget.ratio(shape, "mixed rows") for shape in (plain, shaped)] == [1.5, 1.15]
    assert budget.ratio(plain, "merged") == 1.5, "--max-ratio stands where the file says nothing"
    assert budget.swap_us == {"bound": 500.0}
    assert (budget.memory("process", "dynamic"), budget.memory("device", "dynamic")) == (400.0, 900.5)
    assert budget.memory("process", "base") is None


def test_max_ratio_is_for_the_base_alone():
    budget = Budget(max_ratio=1.1)
    assert budget.ratio((1, 1, 0), "dynamic") == 1.1 and budget.ratio((1, 1, 0), AGAINST) is None
    assert Budget().ratio((1, 1, 0), "dynamic") is None


def test_the_sample_is_one():
    assert read_budget(SAMPLE).ratios["dynamic"] > 1


@pytest.mark.parametrize(
    ("text", "what", "words"),
    [
        (
            "[p99_ms]\ndynamic = 3",
            "a key that means nothing",
            ("p99_ms", "ratio, difference, swap_us, memory_mb, device_memory_mb"),
        ),
        ("[swap_us]\np99 = 3", "a key that means nothing", ("swap_us", "p99", "bound, loaded")),
        ("ratio = 1.1", "is no table", ("ratio", "[ratio]")),
        ('[ratio]\ndynamic = "1.1"', "no positive number", ("ratio.dynamic", "'1.1'")),
        ("[ratio]\ndynamic = true", "no positive number", ("ratio.dynamic", "True")),
        ("[ratio]\ndynamic = nan", "no positive number", ("ratio.dynamic",)),
        ("[memory_mb]\ndynamic = 0", "no positive number", ("memory_mb.dynamic", "0")),
        ('[ratio."4by128"]\ndynamic = 1.1', "after no shape", ('ratio."4by128"', "BATCHxSEQUENCE@PAST")),
        ("[ratio]\n", "limits nothing", ("ratio, difference, swap_us",)),
        ("", "limits nothing", ()),
        ("[ratio\n", "is no TOML", ()),
    ],
)
def test_what_means_nothing_is_refused(text, what, words, tmp_path):
    with pytest.raises(InputRefused) as caught:
        read_budget(written(text, tmp_path))
    assert what in str(caught.value) and "budget.toml" in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputRefused, match="There is no such budget") as refused:
        read_budget(tmp_path / "none.toml")
    assert refused.value.expected == "a TOML file"
    with pytest.raises(InputRefused, match="cannot be read"):
        read_budget(tmp_path)
