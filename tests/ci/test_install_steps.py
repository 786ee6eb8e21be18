"""The CI kit's own steps, run one after another with a real pip: what is installed, from where, and what is kept."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from command_line import served

ROOT = Path(__file__).parents[2]
GITHUB, GITLAB = ROOT / "ci/github/lora-export-gate.yml", ROOT / "ci/gitlab/lora-export-gate.yml"
# A package of this name without dependencies, whose command is the one under test: what pip does with it needs no network.
BACKEND = """
import zipfile
def build_wheel(folder, config_settings=None, metadata_directory=None):
    name, info = "lora_export-{v}-py3-none-any.whl", "lora_export-{v}.dist-info"
    with zipfile.ZipFile(f"{{folder}}/{{name}}", "w") as wheel:
        wheel.writestr(f"{{info}}/METADATA", "Metadata-Version: 2.1\\nName: lora-export\\nVersion: {v}\\n")
        wheel.writestr(f"{{info}}/WHEEL", "Wheel-Version: 1.0\\nGenerator: x\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{{info}}/entry_points.txt", "[console_scripts]\\nlora-export = stand_in:main\\n")
        wheel.writestr("stand_in.py", open("stand_in.py").read())
        wheel.writestr(f"{{info}}/RECORD", "")
    return name
"""
STAND_IN = """
import os, sys
def main():
    with open(os.environ["LOG"], "a") as log:
        log.write(" ".join(sys.argv[1:]) + "\\n")
    if os.environ.get("REAL"):
        os.execv(os.environ["REAL"], [os.environ["REAL"], *sys.argv[1:]])
"""


def package(folder: Path, version: str = "0.1.0") -> Path:
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (folder / "backend.py").write_text(BACKEND.format(v=version))
    (folder / "stand_in.py").write_text(STAND_IN)
    return folder


def built(source: Path, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    code = f"import sys; sys.path.insert(0, '.'); from backend import build_wheel; print(build_wheel({str(folder)!r}))"
    name = subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True, text=True).stdout
    return folder / name.strip()


@pytest.fixture
def requirement(request, tmp_path) -> dict[str, str]:
    """What to install, and from which index, relative to the repository that the job has checked out."""
    repository = tmp_path / "repository"
    source = package(repository / "vendor/lora-export")
    if request.param == "folder":
        return {"requirement": "./vendor/lora-export"}
    if request.param == "wheel":
        return {"requirement": str(built(source, repository / "wheels").relative_to(repository))}
    if request.param == "git":
        git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
        for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
            subprocess.run([*git, *command], cwd=source, check=True)
        return {"requirement": f"git+file://{source}"}
    index = tmp_path / "index/lora-export"
    wheels = [built(source, index), built(package(tmp_path / "newer", "0.2.0"), index)]
    (index / "index.html").write_text("".join(f'<a href="{wheel.name}">{wheel.name}</a>' for wheel in wheels))
    (repository / "pins.txt").write_text("lora-export==0.1.0\n")
    return {"requirement": "lora-export", "index-url": f"file://{index.parent}", "constraints": "pins.txt"}


class GitHubJob:
    """The job of the workflow, run step by step as its runner does: environment, expressions, files of the runner."""

    def __init__(self, folder: Path, inputs: dict[str, str], **environment: str) -> None:
        workflow = yaml.safe_load(GITHUB.read_text("utf-8"))
        declared = workflow[True]["workflow_call"]["inputs"]
        missing = {name for name, entry in declared.items() if entry.get("required")} - set(inputs)
        assert not missing and set(inputs) <= set(declared), (missing, inputs)
        self.inputs = {name: entry.get("default", "") for name, entry in declared.items()} | inputs
        self.job, self.folder, self.uploaded = workflow["jobs"]["gate"], folder, {}
        self.files = {name: folder.parent / name.lower() for name in ("GITHUB_ENV", "GITHUB_PATH")}
        for file in self.files.values():
            file.write_text("")
        self.environment = {name: self.value(value) for name, value in self.job["env"].items()} | environment
        self.environment |= {name: str(file) for name, file in self.files.items()}
        self.environment |= {"RUNNER_TEMP": str(folder.parent / "temp"), "HOME": str(folder.parent)}
        (folder.parent / "temp").mkdir(exist_ok=True)

    def value(self, text: str) -> str:
        known = {f"inputs.{name}": value for name, value in self.inputs.items()}
        known |= {"toJSON(inputs)": json.dumps(self.inputs), "secrets.hf-token": ""}
        known |= {f"env.{line.partition('=')[0]}": line.partition("=")[2] for line in self.set_so_far()}
        return re.sub(r"\$\{\{ *(.*?) *\}\}", lambda found: known[found[1]], str(text))

    def set_so_far(self) -> list[str]:
        return self.files["GITHUB_ENV"].read_text().splitlines()

    def run(self, only: Sequence[str] = ()) -> list[str]:
        """Run the steps (all, or `only` some) and give the names of those that are scripts; all of them must succeed."""
        names = []
        for step in self.job["steps"]:
            if step.get("uses", "").startswith("actions/upload-artifact"):
                self.uploaded[self.value(step["with"]["name"])] = self.folder / self.value(step["with"]["path"])
            if "run" not in step or (only and step["name"] not in only):
                continue
            names.append(step["name"])
            path = ":".join([*reversed(self.files["GITHUB_PATH"].read_text().split()), os.environ["PATH"]])
            env = os.environ | self.environment | {name: self.value(text) for name, text in step.get("env", {}).items()}
            env |= dict(line.split("=", 1) for line in self.set_so_far()) | {"PATH": path}
            done = subprocess.run(
                ["bash", "-e", "-o", "pipefail", "-c", step["run"]],
                cwd=self.folder,
                env=env,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, step["name"] + done.stdout + done.stderr
        return names


@pytest.mark.parametrize("requirement", ["folder", "wheel", "git", "index"], indirect=True)
def test_github_installs_from_anywhere_and_runs_the_command(requirement, tmp_path):
    inputs = {"adapters": "one two", "provider": "cpu", "base": "a base"} | requirement
    job = GitHubJob(tmp_path / "repository", inputs, LOG=str(tmp_path / "log"), REAL="")
    assert job.run() == [
        "Name the caches", "Install", "Export", "Check parity", "Bench latency", "Name the reports",
    ]  # fmt: skip
    assert [line.split()[0] for line in (tmp_path / "log").read_text().splitlines()] == ["dynamic", "check", "bench"]
    pip = [str(tmp_path / "temp/lora-export-venv/bin/pip"), "list", "--format=freeze"]
    frozen = subprocess.run(pip, check=True, capture_output=True, text=True).stdout
    assert "lora-export==0.1.0" in frozen


def test_two_calls_keep_their_reports_apart(tmp_path):
    names = []
    for adapters in ("one", "two"):
        inputs = {"requirement": "lora-export", "adapters": adapters}
        (tmp_path / adapters / "repository").mkdir(parents=True)
        job = GitHubJob(tmp_path / adapters / "repository", inputs)
        job.run(["Name the reports"])
        names += job.uploaded
    assert len(set(names)) == 2 and all(re.fullmatch(r"lora-export-dynamic-[0-9a-f]{8}", name) for name in names)


def test_github_s_steps_on_a_real_export(bases, adapters, tmp_path, short_timing):
    """From the checkout to the reports, with the command itself, on the CPU."""
    package(tmp_path / "repository/vendor/lora-export")
    inputs = {
        "requirement": "./vendor/lora-export", "base": str(bases["classifier"]), "adapters": str(adapters["plain"]),
        "provider": "cpu", "check-arguments": "--rows 4", "bench-arguments": "--shape 2x4 --blocks 6", "max-ratio": "1000",
    }  # fmt: skip
    with served(tmp_path) as real:
        job = GitHubJob(tmp_path / "repository", inputs, REAL=str(real), LOG=str(tmp_path / "log"))
        job.run()
    (reports,) = job.uploaded.values()
    assert {"check.html", "bench.junit.xml"} <= {path.name for path in reports.iterdir()}


@pytest.mark.parametrize("requirement", ["index"], indirect=True)
def test_gitlab_installs_what_is_named(requirement, tmp_path):
    job = yaml.safe_load(GITLAB.read_text("utf-8"))["lora-export-gate"]
    variables = {name: str(value) for name, value in job["variables"].items() if "$" not in str(value)}
    given = {f"LORA_EXPORT_{name.upper().replace('-', '_')}": value for name, value in requirement.items()}
    given |= {"LORA_EXPORT_PROVIDER": "cpu", "LORA_EXPORT_ADAPTERS": "one", "LOG": str(tmp_path / "log"), "REAL": ""}
    script = "\n".join([*job["before_script"], *job["script"]])

    def run(**extra: str) -> subprocess.CompletedProcess:
        environment = os.environ | variables | given | extra
        command = ["bash", "-e", "-c", script]
        return subprocess.run(command, env=environment, cwd=tmp_path / "repository", capture_output=True, text=True)

    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in (tmp_path / "log").read_text().splitlines()] == ["dynamic", "check", "bench"]
    missing = run(LORA_EXPORT_REQUIREMENT="")
    assert missing.returncode == 2 and "LORA_EXPORT_REQUIREMENT says what to install" in missing.stderr
