"""README and docs/ say what is true: their tables are the code's, their commands and options exist, their Python runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import click
import pytest
from command_line import SHORT_TIMING

from lora_export.adapters.on_quantized import markdown_table as quantized_table
from lora_export.adapters.support import markdown_table
from lora_export.check.judge.tolerances import markdown_table as gates_table
from lora_export.cli.main import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
# A Python block under this comment is not run.
NOT_RUN = "<!-- not run by the tests: "
MOST_NOT_RUN = 1

every_page = pytest.mark.parametrize("page", PAGES)


def options_of(command: click.Command) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


def commands_of(text: str) -> set[str]:
    return set(re.findall(r"lora-export ([a-z]+)\b", text))


def command_lines(text: str) -> list[str]:
    """Lines and code spans that call `lora-export`, without comments, each continued one joined."""
    joined = text.replace("\\\n", " ")
    lines = re.findall(r"^ *(?:\$ )?(lora-export [a-z]+ .*)$", joined, re.MULTILINE)
    return [line.split(" #")[0] for line in [*lines, *re.findall(r"`(lora-export [a-z]+ [^`]*)`", joined)]]


def python_blocks(text: str) -> list[tuple[bool, str]]:
    """Whether each Python block is to be run, and the block."""
    found = re.findall(rf"({NOT_RUN}.*?-->\n)?```python\n(.*?)```", text, re.DOTALL)
    return [(not marked, block) for marked, block in found]


def test_support_table_is_the_one_that_drives_the_refusals():
    page = PAGES["docs/supported.md"]
    between = page.split("support, held by a test -->\n")[1].split("<!-- end of support table -->")[0]
    assert between == markdown_table()


def test_the_table_of_quantized_bases_is_the_one_that_drives_the_refusals():
    page = PAGES["docs/quantize.md"]
    between = page.split("on_quantized, held by a test -->\n")[1].split("<!-- end of refusals -->")[0]
    assert between == quantized_table()


def test_gates_are_those_that_check_uses():
    page = PAGES["docs/check.md"]
    between = page.split("tolerances, held by a test -->\n")[1].split("<!-- end of gates -->")[0]
    assert between == gates_table()


def test_readme_names_every_command():
    assert commands_of(README) == set(main.commands)


@every_page
def test_every_named_command_exists(page):
    assert commands_of(PAGES[page]) <= set(main.commands)


@pytest.mark.parametrize("line", dict.fromkeys(line for text in PAGES.values() for line in command_lines(text)))
def test_options_in_command_lines_exist(line):
    words = line.split()
    used = {word.split("=")[0] for word in words if word.startswith("-")}
    assert used <= options_of(main.commands[words[1]]) | {"--help"}, line


def test_figures_of_the_first_page_are_those_of_the_records():
    results = ROOT / "ci/benchmarks/results"
    cells = json.loads((results / "matrix.json").read_text(encoding="utf-8"))["cells"]
    peers = json.loads((results / "peers-x86_64-2cores.json").read_text(encoding="utf-8"))
    races = [race for part in ("decode", "smollm2", "encode") for race in peers[part]["found"]]

    def median(variant: str) -> float:
        return statistics.median(r["median"] for race in races for r in race["ratios"] if r["variant"] == variant)

    assert f"[{len(cells)} cells, 0 unexpected]" in README
    beside = f"merged {median('merged'):.2f} ×, one adapter on all linears {median('one adapter'):.2f} ×."
    assert beside in README


@every_page
def test_options_in_prose_exist(page):
    every = {option for command in main.commands.values() for option in options_of(command)} | {"--help"}
    prose = re.sub(r"^(    |```).*$", "", PAGES[page], flags=re.MULTILINE)
    assert set(re.findall(r"`(--[a-z-]+)", prose)) <= every


@every_page
def test_files_that_a_page_names_exist(page):
    """Scripts, tests and sources."""
    for path in set(re.findall(r"(?<![\w/.-])(?:ci|tests|samples|lora_export)/[\w/.-]*\w", PAGES[page])):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", ["README.md", "docs/ci.md", "docs/errors.md"])
def test_exit_codes_are_those_of_the_errors(page):
    from lora_export.errors import EnvironmentUnusable, InputRefused, UsageProblem

    expected = ((2, "usage", UsageProblem), (3, "input refused", InputRefused), (4, "environment", EnvironmentUnusable))
    for code, word, error in expected:
        assert error.exit_code == code
        assert re.search(rf"\b{code}(?: \|)? {word}", PAGES[page])


@every_page
def test_no_placeholder_is_left(page):
    assert not re.findall(r"\b(?:FIGURES|SUPPORT_TABLE|ARCHITECTURES|TODO)\b|@[A-Z]+@", PAGES[page])


def test_few_blocks_are_not_run():
    assert sum(not runs for text in PAGES.values() for runs, _ in python_blocks(text)) <= MOST_NOT_RUN


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, bases, adapters, exports) -> Path:
    """A folder with what the pages' Python names: a base, adapters, data, a fine-tune and exports, all tiny."""
    import torch
    import transformers

    from lora_export.export.plan import Request
    from lora_export.pipeline import ExportOptions, export

    folder = tmp_path_factory.mktemp("workplace")
    shutil.copytree(bases["bert"], folder / "base")
    for name in ("topic", "kind"):
        shutil.copytree(adapters[name], folder / "adapters" / name)
    shutil.copytree(exports["bert-dynamic"], folder / "served")
    shutil.copytree(exports["llama-dynamic"], folder / "assistant")
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (folder / "assistant/chat_template.jinja").write_text(template, encoding="utf-8")
    request = Request(str(bases["bart"]), ((str(adapters["bart-all"]), "legal"),), "dynamic")
    export(request, ExportOptions(folder / "translator"))
    model = transformers.AutoModel.from_pretrained(folder / "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("query.weight"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    model.save_pretrained(folder / "fine-tuned")
    examples = [{"text": f"text number {n}", "label_id": n % 3} for n in range(16)]
    (folder / "heldout").mkdir()
    (folder / "heldout/topic.jsonl").write_text("".join(json.dumps(one) + "\n" for one in examples), encoding="utf-8")
    return folder


# Runs each block of a list in a folder and with names of its own; a line on both streams ends it.
RUN_BLOCKS = """
import importlib, json, os, sys, traceback
for place, seconds in json.loads(os.environ["SHORT_TIMING"]).items():
    module, _, name = place.rpartition(".")
    setattr(importlib.import_module(module), name, seconds)
for folder, block, end in json.loads(sys.stdin.read()):
    os.chdir(folder)
    try:
        exec(compile(block, "block", "exec"), {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        print("FAILED", file=sys.stderr)
    print(end, file=sys.stderr, flush=True)
"""
END = "-- end of a block --"


def blocks_of(page: str) -> dict[str, str]:
    """The blocks to run by name."""
    blocks = enumerate(python_blocks(PAGES[page]), 1)
    return {f"{page}-{number}": block for number, (runs, block) in blocks if runs}


@pytest.fixture(scope="module")
def said(workplace, tmp_path_factory):
    """What each block prints on standard error; a page's run in one process, which loads the libraries once."""
    by_page: dict[str, dict[str, str]] = {}

    def run(page: str) -> dict[str, str]:
        folder, calls = tmp_path_factory.mktemp("page"), []
        for block in blocks_of(page).values():
            own = folder / str(len(calls))
            shutil.copytree(workplace, own)
            calls.append([str(own), block, END])
        done = subprocess.run(
            [sys.executable, "-c", RUN_BLOCKS], input=json.dumps(calls), capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "SHORT_TIMING": json.dumps(SHORT_TIMING)}, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return dict(zip(blocks_of(page), done.stderr.split(f"{END}\n")[:-1], strict=True))

    def get(name: str) -> str:
        page = name.rpartition("-")[0]
        if page not in by_page:
            by_page[page] = run(page)
        return by_page[page][name]

    return get


@pytest.mark.parametrize("name", [name for page in PAGES for name in blocks_of(page)])
def test_python_runs(name, said):
    """A page's Python, as it stands there, prints no warning either."""
    assert "FAILED\n" not in said(name), said(name)
    assert "[W:onnxruntime" not in said(name)
