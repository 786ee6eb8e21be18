"""A fleet of good and bad adapters: each becomes what it is alone, and a second run does what has changed."""

from __future__ import annotations

import csv
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from importlib.resources import files
from pathlib import Path

import onnxruntime as ort
import pytest
import safetensors.torch
from command_line import call, fails
from jsonschema import Draft202012Validator
from pyarrow import parquet

from lora_export import pipeline
from lora_export.artifact import read_manifest
from lora_export.errors import EnvironmentUnusable
from lora_export.export.plan import Request, make_plan
from lora_export.fleet import run as fleet_run
from lora_export.fleet.options import FleetOptions
from lora_export.fleet.outcomes import FLEET_SCHEMA, AdapterOutcome, FleetReport, Outcome
from lora_export.fleet.state import before, kept_outcomes, locked, take_up, work_folder
from lora_export.integrity.verify import verify
from lora_export.pipeline import add_adapter


def changed(folder: Path, change) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


def configured(folder: Path, **options: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))


def silenced(tensors) -> None:
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.zero_()


def spoiled(tensors) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory, adapters, bases) -> tuple[Path, Path]:
    """A list of adapters and the fleet made of it."""
    listed, out = tmp_path_factory.mktemp("fleet") / "list", tmp_path_factory.mktemp("out") / "served"
    for name in ("chat", "code", "speak"):
        shutil.copytree(adapters[name], listed / name)
    (listed / "code/chat_template.jinja").write_text("first")
    for name, change in (("idle", silenced), ("nan", spoiled)):
        shutil.copytree(adapters["chat"], listed / name)
        changed(listed / name, change)
    shutil.copytree(adapters["chat"], listed / "odd")
    configured(listed / "odd", layer_replication=[[0, 1]])
    for name in ("chat", "idle"):
        configured(listed / name, base_model_name_or_path="some/other-base")
    result = call("fleet", listed, bases["llama"], "-o", out, "--provider", "cpu", "--workers", 1, "--rows", 4)
    assert result.exit_code == 1, result.output
    assert "6 adapters: 3 served, 2 refused, 1 failed." in result.output
    assert (
        f"remark  2 adapters: an adapter records another base, some/other-base; it is exported on {bases['llama']}"
        in (result.output)
    )
    assert "remark  code: an adapter keeps its own tokenizer" in result.output
    return listed, out


def test_the_report_follows_its_published_schema_which_names_every_field(fleet):
    found = json.loads((fleet[1] / "reports/fleet.json").read_text())
    schema = json.loads(files("lora_export.report").joinpath("schema/fleet-1.schema.json").read_text("utf-8"))
    validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    validator.validate(found)
    assert schema["properties"]["schema"] == {"const": FLEET_SCHEMA}
    derived = {"report", "counts", "exit_code"}
    for kind, part, more in ((FleetReport, schema, derived), (AdapterOutcome, schema["$defs"]["adapter"], set())):
        assert part["properties"].keys() == {field.name for field in dataclasses.fields(kind)} | more
    assert set(schema["properties"]["counts"]["properties"]) == set(Outcome)
    assert not validator.is_valid(found | {"more": 1}) and not validator.is_valid(found | {"exit_code": 2})


def test_each_adapter_has_its_own_outcome(fleet):
    found = json.loads((fleet[1] / "reports/fleet.json").read_text())
    by_name = {entry["name"]: entry for entry in found["adapters"]}
    assert found["counts"] == {"served": 3, "refused": 2, "failed": 1, "broken": 0} and found["exit_code"] == 1
    assert {name: entry["outcome"] for name, entry in by_name.items()} == {
        "chat": "served", "code": "served", "speak": "served", "idle": "failed", "nan": "refused", "odd": "refused",
    }  # fmt: skip
    assert "layer_replication" in by_name["odd"]["reason"] and "not finite" in by_name["nan"]["reason"]
    assert "the adapter has no effect here" in by_name["idle"]["reason"]
    for name in ("chat", "code", "speak"):
        entry = by_name[name]
        assert entry["largest_error"] < 1e-4 < entry["largest_effect"] and entry["n_rows"] == 4, entry


def test_what_is_served_is_what_dynamic_and_add_make(fleet, bases, adapters, tmp_path):
    out = fleet[1]
    assert verify(out).passed
    assert (out / "adapters/code/chat_template.jinja").read_text() == "first" and not (
        out / "chat_template.jinja"
    ).exists()
    manifest = read_manifest(out)
    assert [record.name for record in manifest.adapters] == ["chat", "code", "speak"]
    alone = tmp_path / "alone"
    call(
        "dynamic",
        bases["llama"],
        fleet[0] / "chat",
        "--provider",
        "cpu",
        "--targets",
        "all-linear",
        "--targets",
        "lm_head",
        "-o",
        alone,
    )
    add_adapter(alone, [(str(fleet[0] / "code"), "code"), (str(fleet[0] / "speak"), "speak")])
    for name in ("chat", "code", "speak"):
        file = f"adapters/{name}.onnx_adapter"
        read = [ort.AdapterFormat.read_adapter(str(folder / file)).get_parameters() for folder in (out, alone)]
        assert read[0].keys() == read[1].keys()
        assert all((read[0][key].numpy() == read[1][key].numpy()).all() for key in read[0])
    report = json.loads(call("check", out, "--rows", 4, "--provider", "cpu", "--json").stdout)
    assert report["verdict"] == "pass"


def test_reports_name_all_and_filter_by_a_script_of_their_own(fleet):
    reports = fleet[1] / "reports"
    page = (reports / "fleet.html").read_text()
    assert page.count("<script>") == 1 and "script-src 'sha256-" in page and "1 failed" in page
    rows = (reports / "fleet.csv").read_text().splitlines()
    assert rows[0].startswith("name,outcome,reason") and [row.split(",")[0] for row in rows[1:]] == [
        "chat", "code", "idle", "nan", "odd", "speak",
    ]  # fmt: skip
    suite = (reports / "fleet.junit.xml").read_text()
    assert suite.count("<skipped") == 2 and suite.count("<failure") == 1 and 'tests="6"' in suite
    found = parquet.read_table(reports / "fleet.parquet").to_pylist()
    assert [row["name"] for row in found] == [row.split(",")[0] for row in rows[1:]]
    assert found[0]["outcome"] == "served" and found[0]["n_rows"] == 4 and 0 <= found[0]["largest_error"] < 1e-4
    assert found[3]["largest_error"] is None and "not finite" in found[3]["reason"]


def test_what_dynamic_would_remark_on_an_adapter_is_in_every_report(fleet, bases):
    plan = make_plan(Request(str(bases["llama"]), ((str(fleet[0] / "chat"), "chat"),), "dynamic", provider="cpu"))
    reports = fleet[1] / "reports"
    by_name = {entry["name"]: entry for entry in json.loads((reports / "fleet.json").read_text())["adapters"]}
    assert by_name["chat"]["remarks"] == list(plan.remarks) and len(plan.remarks) == 1
    assert "keeps its own tokenizer" in by_name["code"]["remarks"][0] and by_name["speak"]["remarks"] == []
    rows = {row["name"]: row["remarks"] for row in csv.DictReader((reports / "fleet.csv").read_text().splitlines())}
    assert rows["chat"] == plan.remarks[0] and rows["speak"] == ""
    kept = {row["name"]: row["remarks"] for row in parquet.read_table(reports / "fleet.parquet").to_pylist()}
    assert kept["chat"] == plan.remarks[0] and kept["speak"] is None
    page = (reports / "fleet.html").read_text()
    assert "an adapter records another base" in page and "adapters/NAME/" in page and "adapters/code/" in page


def interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_a_second_run_does_what_has_changed(fleet, bases, tmp_path, monkeypatch):
    listed, out = tmp_path / "list", tmp_path / "served"
    shutil.copytree(fleet[0], listed)
    shutil.copytree(fleet[1], out)
    given = []
    original = fleet_run.Packing
    monkeypatch.setattr(fleet_run, "Packing", lambda *a, **k: given.append(a[1]) or original(*a, **k))
    shutil.rmtree(listed / "speak")
    changed(listed / "code", lambda tensors: next(iter(tensors.values())).mul_(0.5))
    (listed / "code/chat_template.jinja").write_text("second")
    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr(fleet_run, "write_manifest", interrupt)
        pipeline.fleet(listed, str(bases["llama"]), FleetOptions(out, provider="cpu", n_workers=1, n_rows=4))
    assert given == ["code"] and verify(out).passed and len(read_manifest(out).adapters) == 3, "the old fleet is there"
    result = call("fleet", listed, bases["llama"], "-o", out, "--provider", "cpu", "--workers", 1, "--rows", 4)
    assert given == ["code"], "what the stopped run found is not done again"
    assert result.exit_code == 1 and "5 adapters: 2 served, 2 refused, 1 failed. 5 were known" in result.output
    assert {record.name: record.source.given for record in read_manifest(out).adapters} == {
        name: str(listed / name) for name in ("chat", "code")
    }, "where they are now, packed again or not"
    changed(listed / "code", lambda tensors: next(iter(tensors.values())).mul_(0.5))
    same = ("fleet", listed, bases["llama"], "-o", out, "--provider", "cpu", "--workers", 1, "--rows", 4)
    result = call(*same, "--only-changed")
    assert result.exit_code == 0 and "1 adapter: 1 served. 4 more are as they were." in result.output
    result = call(*same, "--only-changed")
    assert result.exit_code == 0 and "0 adapters: nothing to do. 5 more are as they were." in result.output
    assert len(read_manifest(out).adapters) == 2
    assert not (out / "adapters/speak.onnx_adapter").exists() and verify(out).passed
    assert (out / "adapters/code.onnx_adapter").read_bytes() != (fleet[1] / "adapters/code.onnx_adapter").read_bytes()
    assert (out / "adapters/chat.onnx_adapter").read_bytes() == (fleet[1] / "adapters/chat.onnx_adapter").read_bytes()
    assert (out / "adapters/code/chat_template.jinja").read_text() == "second"
    assert not work_folder(out).exists()
    kept = kept_outcomes(out)
    assert kept["code"].outcome is Outcome.SERVED
    assert "records another base" in kept["chat"].remarks[0], "also of what is not packed again"


def actors_at_work(ray_folder: str) -> list[int]:
    """Process numbers of this test's Ray actors that have an assignment."""
    own = f"RAY_TMPDIR={ray_folder}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::_Actor.answer") and own in (path.parent / "environ").read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_worker_that_is_killed_twice_loses_nothing_and_the_bytes_are_those_of_processes(
    fleet, bases, ray_folder, tmp_path
):
    listed, by_processes = fleet
    out, killed = tmp_path / "by ray", []

    def kill_two() -> None:
        until = time.monotonic() + 240
        while len(killed) < 2 and time.monotonic() < until:
            for process in actors_at_work(ray_folder):
                if process not in killed and len(killed) < 2:
                    time.sleep(0.3)
                    os.kill(process, signal.SIGKILL)
                    killed.append(process)
            time.sleep(0.02)

    killer = threading.Thread(target=kill_two)
    killer.start()
    command = ("fleet", listed, bases["llama"], "-o", out, "--provider", "cpu", "--workers", 1, "--rows", 4)
    result = call(*command, "--ray", "local")
    killer.join()
    assert result.exit_code == 1, result.output  # of `idle`, as with processes
    assert len(killed) == 2
    reports = [json.loads((folder / "reports/fleet.json").read_text()) for folder in (by_processes, out)]
    mine, theirs = ({each["name"]: each for each in report["adapters"]} for report in reversed(reports))
    for name, adapter in theirs.items():
        assert {key: mine[name][key] for key in ("outcome", "reason", "files", "largest_error", "record")} == {
            key: adapter[key] for key in ("outcome", "reason", "files", "largest_error", "record")
        }, name
    for path in sorted(by_processes.rglob("*")):
        if path.is_file() and "reports" not in path.parts:
            assert (out / path.relative_to(by_processes)).read_bytes() == path.read_bytes(), path


def test_a_dry_run_reads_headers_and_writes_nothing(fleet, bases, tmp_path):
    found = json.loads(call("fleet", fleet[0], bases["llama"], "-o", tmp_path / "o", "--dry-run", "--json").stdout)
    assert (found["adapters"], found["kinds"]) == (6, 4) and found["bytes"] > 0
    assert list(tmp_path.iterdir()) == []
    given = ("fleet", fleet[0], bases["llama"], "-o", "memory://store/o", "--dry-run", "--json")
    assert json.loads(call(*given).stdout) == found | {"folder": "memory://store/o"}


def test_what_cannot_be_begun(fleet, bases, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("x")
    assert "holds something that is no fleet" in fails(3, "fleet", fleet[0], bases["llama"], "-o", tmp_path / "mine")
    shutil.copytree(fleet[0] / "odd", tmp_path / "list/odd")
    (tmp_path / "list/odd/adapter_model.safetensors").unlink()
    message = fails(3, "fleet", tmp_path / "list", bases["llama"], "-o", tmp_path / "out")
    assert "No adapter of the list can be exported" in message and "odd: The adapter has no weights" in message
    assert not (tmp_path / "out").exists()


def test_a_fleet_that_was_being_replaced_is_put_back(tmp_path):
    out = tmp_path / "out"
    before(out).mkdir(parents=True)
    (before(out) / "file").write_text("old")
    take_up(out)
    assert (out / "file").read_text() == "old"
    before(out).mkdir()
    take_up(out)
    assert (out / "file").read_text() == "old" and not before(out).exists(), "a fleet that is there stays"


def _hold(out: Path, ready, done) -> None:
    with locked(out):
        ready.set()
        done.wait(30)


def test_two_fleets_of_one_folder_are_refused(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "out", ready, done))
    other.start()
    assert ready.wait(30)
    with (
        pytest.raises(EnvironmentUnusable, match="Another fleet is being made in this folder"),
        locked(tmp_path / "out"),
    ):
        pass
    done.set()
    other.join()
    with locked(tmp_path / "out"):
        pass
