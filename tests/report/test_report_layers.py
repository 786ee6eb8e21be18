"""Where an export differs and the error by layer: the same numbers in every rendering, none cut, none by colour alone."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from lora_export.check.divergence_results import Divergence
from lora_export.check.results import CheckReport
from lora_export.report import layer_tables
from lora_export.report.as_json import render_json
from lora_export.report.html import render_check_html
from lora_export.report.markdown import render_check_markdown
from lora_export.report.text import render_check_text


def test_every_module_stands_in_the_page_and_in_the_json(passing_check: CheckReport, hostile: str) -> None:
    page, stored = render_check_html(passing_check), json.loads(render_json(passing_check))
    for layers, kept in zip(passing_check.layers, stored["layers"], strict=True):
        assert kept["name"] == layers.name and len(kept["modules"]) == len(layers.modules) == 12
        for module, entry in zip(layers.modules, kept["modules"], strict=True):
            assert (entry["module"], entry["error"]) == (module.module, module.error)
            assert module.module in page and module.node in page
    assert page.count("<details") == 3 and "topic: no value of the graph is the output of router" in page
    assert hostile not in page


def test_the_summary_names_the_worst_module(failing_check: CheckReport) -> None:
    table = layer_tables.layer_summary(failing_check)
    rows = {row.cells[0].text: [cell.text for cell in row.cells[1:]] for row in table.rows}
    assert rows["topic"] == ["12", "1.4e-07", "2.8e-07", "encoder.layer.2.norm"]
    assert rows["broken"] == ["1", "NaN", "NaN", "layer.0"]
    for text in (render_check_text(failing_check), render_check_markdown(failing_check)):
        assert "encoder.layer.2.norm" in text and "Error by layer, in short" in text


def test_the_plot_has_a_curve_for_each_and_the_largest(passing_check: CheckReport) -> None:
    markup = layer_tables.layer_plot(passing_check)
    assert len(re.findall('class="curve each"', markup)) == 3 and len(re.findall('class="curve worst"', markup)) == 1
    # Depth is counted, not on a logarithmic axis; an error of 0 has no place on the other.
    ticks = re.findall(r'class="tick middle">(\d+)<', markup)
    assert ticks == ["1", "2", "4", "6", "8", "10", "12"]
    assert markup.count("polyline") and "1e-07" in markup
    assert layer_tables.layer_plot(replace(passing_check, layers=())) == ""


def test_many_rows_are_folded_away(passing_check: CheckReport) -> None:
    assert "<details open>" in render_check_html(passing_check)
    many = replace(passing_check, layers=tuple(replace(passing_check.layers[0], name=f"a{n}") for n in range(9)))
    assert "<details open>" not in render_check_html(many) and "<details>" in render_check_html(many)


def test_the_first_difference_is_named_in_every_rendering(failing_check: CheckReport) -> None:
    page = render_check_html(failing_check)
    assert 'id="where"' in page and "MatMul node_1 in model.onnx" in page and "row 5 of 16" in page
    assert "1 × 7 × 0" in page and "PyTorch: 1 × 7 × 32" in page
    text = " ".join(render_check_text(failing_check).split())
    markdown = render_check_markdown(failing_check).replace("\\", "")
    for found in (" ".join(page.split()), text, markdown):
        assert "layer.0.query: MatMul node_1 is the first node that differs from PyTorch" in found
        assert "reports/reproduce.py shows it with onnxruntime and numpy alone: logits differs by 8.2e-01" in found
        assert "Intermediate tensors" in found


def test_a_difference_that_was_not_found_says_why(failing_check: CheckReport) -> None:
    unknown = Divergence("half precision", "", 1e-4, "What the session feeds differs, no node.")
    report = replace(failing_check, divergence=unknown)
    page = render_check_html(report)
    assert page.count("What the session feeds differs, no node.") == 1 and 'id="where"' not in page
    assert layer_tables.reproduction_sentences(report) == () and "To see it" not in render_check_text(report)


@pytest.mark.parametrize("render", [render_check_html, render_check_text, render_check_markdown])
def test_a_report_without_layers_says_nothing_of_them(render, empty_check: CheckReport) -> None:
    assert "Error by layer" not in render(empty_check) and "Intermediate tensors" not in render(empty_check)
