"""The CI kit: files that GitHub and GitLab accept, commands that exist, and jobs that end as the exit codes say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command_line import served

from lora_export.cli.main import main

ROOT = Path(__file__).parents[2]
GITHUB, GITLAB = ROOT / "ci/github/lora-export-gate.yml", ROOT / "ci/gitlab/lora-export-gate.yml"
CODES = (0, 1, 3, 4, 5)


def load(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def is_valid(path: Path, schema: str) -> bool:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, path]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("path", "schema", "before", "after"),
    [
        (GITHUB, "vendor.github-workflows", "runs-on:", "runs-in:"),
        (GITLAB, "vendor.gitlab-ci", "exit_codes: [5]", "exit_codes: [five]"),
    ],
    ids=["github", "gitlab"],
)
def test_the_vendors_schema_is_kept(path, schema, before, after, tmp_path):
    assert is_valid(path, schema)
    broken = tmp_path / path.name
    broken.write_text(path.read_text("utf-8").replace(before, after), encoding="utf-8")
    assert not is_valid(broken, schema)


def github_steps() -> list[dict]:
    return load(GITHUB)["jobs"]["gate"]["steps"]


def test_inputs_that_are_used_are_declared_and_every_declared_one_is_used():
    workflow = load(GITHUB)
    declared = set(workflow[True]["workflow_call"]["inputs"])  # YAML 1.1 reads `on` as true
    assert declared == set(re.findall(r"\binputs\.([\w-]+)", GITHUB.read_text("utf-8")))


def test_nothing_from_outside_is_pasted_into_a_script():
    """An input with a quote in it must stay an argument."""
    for step in github_steps():
        assert "${{" not in step.get("run", ""), step["name"]


@pytest.mark.parametrize("path", [GITHUB, GITLAB], ids=["github", "gitlab"])
def test_options_and_exit_codes_are_those_of_the_command(path):
    text = path.read_text("utf-8")
    scripts = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    found = re.findall(r"^[^#\n]*lora-export (\S+) (.*(?:\n +--.*)?)", scripts, re.MULTILINE)
    assert [command.strip('"') for command, _ in found] == [found[0][0].strip('"'), "check", "bench"]
    for command, rest in found:
        names = {"check", "bench"} & {command} or ({"merge", "dynamic"} if "MODE" in command else set())
        for name in names:
            options = {option for parameter in main.commands[name].params for option in parameter.opts}
            assert set(re.findall(r"(?<!\w)--?[a-z][a-z-]*", rest)) <= options, (name, rest)
    for code in ("1 a gate failed", "3 an input was refused", "4 the runner lacks", "5 the latencies were too noisy"):
        assert code in text


@pytest.fixture
def stub(tmp_path) -> Path:
    """A folder with a `lora-export` that notes its arguments and exits with $CHECK or $BENCH, and a `pip` that notes."""
    for name in ("lora-export", "pip"):
        script = '#!/bin/sh\nfor word in "$@"; do printf "%s|" "$word"; done >> "$LOG"; echo >> "$LOG"\n'
        script += 'case $1 in check) exit "$CHECK" ;; bench) exit "$BENCH" ;; esac\n' if name == "lora-export" else ""
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def shell(script: str, stub: Path, **variables: str) -> int:
    environment = {"PATH": f"{stub}:{os.environ['PATH']}", "LOG": str(stub / "log"), "CHECK": "0", "BENCH": "0"}
    return subprocess.run(["bash", "-e", "-c", script], env=environment | variables, capture_output=True).returncode


def run_github(stub: Path, *, check: int, bench: int, undecided: str = "warn", budget: str = "") -> list[int]:
    """Exit codes of the steps that export, check and bench."""
    scripts = {step["name"]: step["run"] for step in github_steps() if "run" in step}
    shared = {"BASE": "a base", "ADAPTERS": "one two", "MODE": "dynamic", "PROVIDER": "cuda", "OUT": "out"}
    shared |= {"ARGUMENTS": "--quiet --json", "MAX_RATIO": "1.10", "BUDGET": budget, "UNDECIDED": undecided}
    shared |= {"CHECK": str(check), "BENCH": str(bench)}
    return [shell(scripts[name], stub, **shared) for name in ("Export", "Check parity", "Bench latency")]


@pytest.mark.parametrize("code", CODES)
def test_github_fails_on_what_failed_and_warns_of_what_is_undecided(code, stub):
    assert run_github(stub, check=code, bench=0) == [0, code, 0]
    assert run_github(stub, check=0, bench=code) == [0, 0, 0 if code == 5 else code]
    assert run_github(stub, check=0, bench=code, undecided="fail") == [0, 0, code]


def test_github_passes_the_arguments_on(stub):
    run_github(stub, check=0, bench=0)
    assert (stub / "log").read_text().splitlines() == [
        "dynamic|a base|one|two|--provider|cuda|-o|out|--overwrite|--quiet|--json|",
        "check|out|--provider|cuda|--quiet|--json|",
        "bench|out|--provider|cuda|--max-ratio|1.10|--quiet|--json|",
    ]
    run_github(stub, check=0, bench=0, budget="my budget.toml")
    assert (stub / "log").read_text().splitlines()[-1] == (
        "bench|out|--provider|cuda|--max-ratio|1.10|--budget|my budget.toml|--quiet|--json|"
    )


def test_github_keeps_the_reports_of_a_failed_check_and_times_it_too():
    steps = {step.get("name"): step for step in github_steps()}
    for name in ("Bench latency", "Keep the reports"):
        assert steps[name]["if"] == "${{ !cancelled() && steps.export.outcome == 'success' }}"
    assert steps["Keep the reports"]["with"]["path"] == "lora-export-gate/reports/"
    assert load(GITHUB)["jobs"]["gate"]["env"]["OUT"] == "lora-export-gate"


def run_gitlab(stub: Path, *, check: int, bench: int, base: str = "a base", budget: str = "") -> int:
    """The job's exit code: GitLab runs the lines of a script one after another in one shell that stops at an error."""
    job = load(GITLAB)["lora-export-gate"]
    variables = {name: str(value) for name, value in job["variables"].items() if "$" not in str(value)}
    variables |= {"LORA_EXPORT_BASE": base, "LORA_EXPORT_ADAPTERS": "one two", "LORA_EXPORT_BENCH": "--shape 4x128"}
    variables["LORA_EXPORT_BUDGET"] = budget
    return shell("\n".join(job["script"]), stub, **variables, CHECK=str(check), BENCH=str(bench))


@pytest.mark.parametrize("check", CODES[:-1])
@pytest.mark.parametrize("bench", CODES)
def test_gitlab_ends_with_the_check_and_then_the_bench(check, bench, stub):
    assert run_gitlab(stub, check=check, bench=bench) == (check or bench)
    assert "bench|" in (stub / "log").read_text(), "a failed check is timed too"


def test_gitlab_allows_what_is_undecided_and_shows_the_reports():
    job = load(GITLAB)["lora-export-gate"]
    assert job["allow_failure"] == {"exit_codes": [5]}
    artifacts = job["artifacts"]
    assert artifacts["when"] == "always" and artifacts["reports"]["junit"] == "lora-export-gate/reports/*.junit.xml"


def test_gitlab_passes_the_arguments_on(stub):
    run_gitlab(stub, check=0, bench=0)
    run_gitlab(stub, check=0, bench=0, base="", budget="my budget.toml")
    log = (stub / "log").read_text().splitlines()
    assert log[:3] == [
        "dynamic|a base|one|two|--provider|cuda|-o|lora-export-gate|--overwrite|",
        "check|lora-export-gate|--provider|cuda|",
        "bench|lora-export-gate|--provider|cuda|--max-ratio|1.10|--shape|4x128|",
    ]
    assert log[3].startswith("dynamic|one|two|--provider"), "an empty base is left out"
    assert "|--budget|my budget.toml|--shape|4x128|" in log[5]


def test_gitlab_s_gate_on_a_real_export(bases, adapters, tmp_path, short_timing):
    """The job's own script with the real command, on the CPU: reports where the artifacts are taken from."""
    job = load(GITLAB)["lora-export-gate"]
    variables = {name: str(value) for name, value in job["variables"].items() if "$" not in str(value)}
    variables |= {"LORA_EXPORT_BASE": str(bases["classifier"]), "LORA_EXPORT_ADAPTERS": str(adapters["plain"])}
    variables |= {"LORA_EXPORT_PROVIDER": "cpu", "LORA_EXPORT_MAX_RATIO": "1000", "LORA_EXPORT_CHECK": "--rows 4"}
    (tmp_path / "budget.toml").write_text("[ratio]\ndynamic = 1000\n[memory_mb]\ndynamic = 10_000\n")
    variables |= {"LORA_EXPORT_BUDGET": "budget.toml"}
    variables |= {"LORA_EXPORT_BENCH": "--shape 2x4 --blocks 6", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with served(tmp_path):
        command = ["bash", "-e", "-c", "\n".join(job["script"])]
        done = subprocess.run(command, env=os.environ | variables, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in (tmp_path / "lora-export-gate/reports").glob("*.junit.xml")) == [
        "bench.junit.xml", "check.junit.xml",
    ]  # fmt: skip
