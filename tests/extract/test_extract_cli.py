"""`lora-export extract` as it is typed, and the report it leaves."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET

import pytest
from click.testing import CliRunner, Result
from finetunes import dense, fine_tune

from lora_export.cli.main import main


def call(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["extract", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"{arguments} ended in a traceback") from result.exception
    return result


@pytest.fixture(scope="module")
def tuned(bases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned") / "tuned"
    return fine_tune(bases["classifier"], folder, "BertForSequenceClassification", dense)


def test_rank_or_energy(bases, tuned, tmp_path):
    for arguments, found in (([], "neither"), (["--rank", 2, "--energy", 0.5], "both")):
        result = call(bases["classifier"], tuned, "-o", tmp_path / "out", *arguments)
        assert result.exit_code == 2 and "Give either --rank or --energy" in result.output and found in result.output


def test_a_refusal_is_exit_3(bases, tmp_path):
    result = call(bases["classifier"], bases["classifier"], "--rank", 2, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 3 and json.loads(result.stdout)["what"] == "The fine-tune is the base: no tensor differs"


def test_a_dry_run_says_what_would_be_written(bases, tuned, tmp_path):
    shared = (bases["classifier"], tuned, "--rank", 2, "-o", tmp_path / "out", "--dry-run")
    text = call(*shared).output
    assert "wrote nothing" in text and "whole    classifier (classification head)" in text and "with biases" in text
    found = json.loads(call(*shared, "--json").stdout)
    assert found["biases"] is True and "--leave-out embeddings --leave-out others" in found["notes"][0]
    found = json.loads(call(*shared, "--leave-out", "embeddings", "--leave-out", "others", "--json").stdout)
    assert found["notes"] == [] and set(found["wholes"]) == {"classifier"}
    assert not (tmp_path / "out").exists()


def test_it_writes_an_adapter_and_its_report(bases, tuned, tmp_path):
    out = tmp_path / "out"
    result = call(bases["classifier"], tuned, "--energy", 0.5, "-o", out)
    assert result.exit_code == 0, result.output
    assert "LoRA pairs (energy 0.5) leave" in result.output and "Saved whole, exactly" in result.output
    assert f"wrote {out / 'reports/extract.html'}" in result.output
    assert call(bases["classifier"], tuned, "--rank", 2, "-o", out).exit_code == 3
    result = call(bases["classifier"], tuned, "--rank", 2, "-o", out, "--overwrite", "--leave-out", "others", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0 and found["report"] == "extract"
    assert {x["kind"] for x in found["left_out"]} == {"others"}
    assert 0 < found["error"] < 1 and found["curves"]["worst"][-1] < 1e-6
    stored = json.loads((out / "reports/extract.json").read_text())
    assert stored["modules"] == found["modules"] and set(stored["sha256"]) == {"base", "fine-tune"}
    assert call(bases["classifier"], tuned, "--rank", 3, "-o", out, "--overwrite", "--quiet").output == ""


def test_the_page_is_self_contained_and_shows_every_module(bases, tuned, tmp_path):
    out = tmp_path / "<out>"
    call(bases["classifier"], tuned, "--rank", 4, "-o", out, "--quiet")
    page = (out / "reports/extract.html").read_text()
    report = json.loads((out / "reports/extract.json").read_text())
    assert "<out>" not in page and "&lt;out&gt;" in page
    assert "default-src 'none'" in page and not re.search(r"(?:src|href)=\"(?!data:)", page) and "<script" not in page
    for module in report["modules"]:
        assert module["module"] in page
    plot = ET.fromstring(re.search(r"<svg class=\"plot framed\".*</svg>", page)[0].split("\n")[0])
    curves = [element for element in plot.iter() if element.tag.endswith("polyline")]
    assert len(curves) == len(report["modules"]) + 2
    worst = next(curve for curve in curves if "worst" in curve.get("class"))
    heights = [int(point.split(",")[1]) for point in worst.get("points").split()]
    assert heights == sorted(heights), "the error falls with the rank, which is downwards"
    assert all(0 <= height <= 1000 for height in heights)
