"""A large base is compared on less, and that is said before anything is."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from lora_export.artifact import Manifest, read_manifest
from lora_export.check import run
from lora_export.check.context import CheckOptions
from lora_export.check.inputs import amount
from lora_export.check.inputs.amount import Amount, amount_of
from lora_export.check.inputs.examples import Example, Examples
from lora_export.cli.main import main
from lora_export.errors import UsageProblem
from lora_export.integrity.sources import SourceOverrides
from lora_export.pipeline import check, plan_check

SMOL = (538e6, 49_152)


@pytest.mark.parametrize(
    ("export", "n_bytes", "vocabulary", "expected"),
    [
        ("llama-dynamic", 1e6, 260, (16, 96)),
        ("llama-dynamic", *SMOL, (8, 21)),
        ("llama-dynamic", 5e9, 128_256, (8, 16)),
        ("classifier-dynamic", 91e6, 0, (16, 96)),
        ("classifier-dynamic", 250e6, 0, (16, 50)),
        ("classifier-dynamic", 1.3e9, 0, (8, 19)),
    ],
)
def test_rows_and_tokens_follow_from_bytes_and_vocabulary(export, n_bytes, vocabulary, expected, exports, monkeypatch):
    monkeypatch.setattr(Manifest, "weights_bytes", lambda manifest, folder: int(n_bytes))
    monkeypatch.setattr(amount, "_vocabulary", lambda manifest: vocabulary)
    found = amount_of(exports[export], read_manifest(exports[export]))
    assert (found.n_rows, found.n_tokens) == expected
    assert found.is_bounded == (expected != (16, 96))


def test_a_file_is_cut_where_every_token_has_a_vocabulary_of_scores():
    lines = Examples(tuple(Example(str(n)) for n in range(20)), "lines.txt (20 of 20 rows)")
    small = Amount()
    bounded = Amount(8, 21, is_bounded=True, is_by_vocabulary=True)
    assert small.of_file(lines) is lines
    cut = bounded.of_file(lines)
    assert [row.text_or_file for row in cut.rows] == ["0", "2", "5", "7", "10", "12", "15", "17"]
    said = "lines.txt (20 of 20 rows), cut to 21 tokens each, as the base is large"
    assert cut.description == f"8 rows of {said}"
    all_rows = replace(bounded, is_by_vocabulary=False).of_file(lines)
    assert (len(all_rows.rows), all_rows.description) == (20, said)


def test_a_large_base_is_checked_on_less_and_says_so_beforehand(exports, own, monkeypatch):
    monkeypatch.setattr(Manifest, "weights_bytes", lambda manifest, folder: 10**9)
    told = []
    monkeypatch.setattr(run, "_dynamic_cases", lambda *args: told.append("compared"))
    report, _ = check(own(exports["llama-dynamic"]), options=CheckOptions(provider="cpu"), remark=told.append)
    assert told[0].startswith("compares chat, code") and told[-1] == "compared"
    assert "cut to 25 tokens each, as the base is large" in " ".join(told)
    assert "cut to 25 tokens each" in report.data[0]


def test_a_dry_run_says_what_would_be_compared_and_writes_nothing(exports, own):
    folder = own(exports["classifier-dynamic"])
    before = sorted(folder.rglob("*"))
    result = CliRunner().invoke(main, ["check", str(folder), "--provider", "cpu", "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "with unmerged PEFT at float32 and a wider dtype on cpu" in result.output
    assert "16 docstrings of Python's standard library" in result.output and "GB beside the libraries" in result.output
    assert sorted(folder.rglob("*")) == before


def test_what_merged_names_is_looked_at_before_the_first_comparison(exports):
    options = CheckOptions(provider="cpu", merged=exports["classifier-merged"])
    with pytest.raises(UsageProblem, match="--merged names no merged export of the same task") as refused:
        plan_check(exports["llama-dynamic"], SourceOverrides(), options)
    assert refused.value.expected == "a merged export for text-generation"
    assert refused.value.found == "a merged export for text-classification"


def test_no_rows_are_a_usage_error(exports):
    result = CliRunner().invoke(main, ["check", str(exports["classifier-dynamic"]), "--rows", "0"])
    assert result.exit_code == 2 and "--rows" in result.output


def test_a_vocabulary_is_the_last_axis_of_the_logits(exports):
    assert amount._vocabulary(read_manifest(exports["llama-dynamic"])) == 260
    assert amount._vocabulary(SimpleNamespace(graphs={})) == 0


def test_rows_that_are_named_win_over_the_size_of_the_base(exports, tmp_path, monkeypatch):
    monkeypatch.setattr(Manifest, "weights_bytes", lambda manifest, folder: 10**9)
    file = tmp_path / "lines.txt"
    file.write_text("".join(f"line {n}\n" for n in range(20)))
    for n_rows, said in ((None, "8 rows of"), (12, "12 of 20 rows"), (99, "20 of 20 rows")):
        options = CheckOptions(provider="cpu", data={None: file}, n_rows=n_rows)
        (line,) = [each for each in plan_check(exports["llama-dynamic"], options=options) if "lines.txt" in each]
        assert said in line and ("rows of" in line) == (n_rows is None)
