"""The command line: exit codes, messages without a traceback, JSON for machines, help that helps."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from command_line import SCRIPT, call, fails

from lora_export import __version__
from lora_export.artifact import read_manifest
from lora_export.cli.main import main
from lora_export.cli.output import Display, exit_code_of

COMMANDS = ("merge", "dynamic", "add", "remove", "check", "bench", "verify", "extract", "inspect", "run")


def test_help_has_every_command_once_and_the_exit_codes():
    text = call("--help").output
    words = " ".join(text.split())
    assert re.findall(r"^  ([a-z]+)  ", text, re.MULTILINE) == list(main.commands)
    assert set(COMMANDS) < set(main.commands)
    assert "..." not in text.partition("\nCommands:\n")[2], "a word of a command's line is cut"
    assert "dynamic write one graph whose adapters are inputs (many tasks in one batch)" in words
    assert "0 done, 1 a gate failed, 2 usage, 3 input refused" in words
    assert call("--version").output == f"lora-export, version {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example(command):
    result = call(command, "--help")
    assert result.exit_code == 0
    assert re.search(rf"Examples?:\n    lora-export {command} ", result.output)
    assert call(command, "-h").output == result.output


def test_help_is_fast_and_loads_nothing_heavy():
    code = """
import sys
from lora_export.cli.main import main
try:
    main(["--help"])
except SystemExit as done:
    heavy = {"torch", "numpy", "transformers", "peft", "onnx", "onnxruntime"} & set(sys.modules)
    sys.exit(f"loaded {heavy}" if heavy or done.code else 0)
"""
    fastest = float("inf")
    for _ in range(5):  # the fastest of a few, in processor time: the machine may be busy
        before = os.times()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=30)
        after = os.times()
        fastest = min(fastest, after[2] + after[3] - before[2] - before[3])  # of children: user and system
    assert fastest < 0.3, f"{fastest:.2f} s"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["merge"],
        ["merge", "base"],
        ["merge", "base", "-o", "out", "--dtype", "int4"],
        ["merge", "base", "-o", "out", "--task", "translation"],
        ["dynamic", "base", "-o", "out", "--provider", "tpu"],
        ["merge", "base", "-o", "out", "--targets", "q_proj"],
        ["bench", "out", "--shape", "4by128"],
        ["bench", "out", "--shape", "4x128x2"],
        ["bench", "out", "--blocks", "3"],
        ["bench", "out", "--max-ratio", "tenth"],
        ["bench", "out", "--max-ratio", "nan"],
        ["check", "out", "--tolerance", "error=nan"],
        ["check", "out", "--tolerance", "error=-1"],
        ["run", "out"],
        ["add", "out"],
        ["remove", "out"],
        ["extract", "base", "-o", "out", "--rank", "4"],
        ["extract", "base", "tuned", "-o", "out", "--rank", "0"],
        ["extract", "base", "tuned", "-o", "out", "--energy", "1.5"],
        ["extract", "base", "tuned", "-o", "out", "--leave-out", "heads"],
    ],
    ids=" ".join,
)
def test_wrong_arguments_are_a_usage_error(arguments):
    assert "Usage:" in fails(2, *arguments)


def test_arguments_that_contradict_each_other(adapters, bases, exports, tmp_path):
    base, out = bases["bert"], tmp_path / "out"
    assert "Nothing to serve: no adapter and no --targets" in fails(2, "dynamic", base, "-o", out)
    text = fails(3, "dynamic", tmp_path / "topcs", "-o", out)
    assert "The base or adapter is not a folder" in text and "nothing at this path" in text
    text = fails(2, "merge", base, adapters["topic"], "-o", out, "--name", "a", "--name", "b")
    assert "More --name than adapters" in text and "2 names for 1 adapters" in text
    text = fails(2, "dynamic", base, adapters["topic"], adapters["topic"], "-o", out)
    assert "Two adapters have the same name" in text and "--name" in text
    text = fails(2, "run", exports["bert-dynamic"], "hi")
    assert "The base has no head of its own" in text and "name one with --adapter: topic, kind" in text
    assert "is no number" in fails(2, "run", exports["bert-dynamic"], "hi", "--adapter", "topic=much")
    assert "The export has no adapter 'nobody'" in fails(2, "run", exports["bert-dynamic"], "hi", "--adapter", "nobody")
    text = fails(2, "run", exports["bert-merged"], "hi", "--adapter", "kind")
    assert "Adapter 'kind' is folded into the weights" in text and "leave it out" in text
    text = fails(2, "check", exports["bert-dynamic"], "--adapter", "somewhere")
    assert "does not say which adapter the path is of" in text and "name one of topic, kind" in text
    assert not out.exists()


def test_inputs_that_are_refused(adapters, bases, exports, own, tmp_path):
    out = tmp_path / "out"
    cases = {
        "The base or adapter is not a folder": ["merge", tmp_path / "nowhere", "-o", out],
        "config.json is missing": ["merge", tmp_path, "-o", out],
        "The adapter is not a folder": ["merge", bases["bert"], tmp_path / "nowhere", "-o", out],
        "The folder holds no PEFT adapter": ["merge", bases["bert"], bases["llama"], "-o", out],
        "The output folder exists": ["merge", bases["classifier"], "-o", exports["bert-merged"]],
        "The folder holds no export": ["check", tmp_path],
        "The folder holds no export, adapter or base": ["inspect", tmp_path],
        "A merged export holds one task": ["add", exports["bert-merged"], adapters["topic"]],
    }
    for message, arguments in cases.items():
        text = fails(3, *arguments)
        assert message in text and "\nerror: " in f"\n{text}", arguments
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "{export}", "hi", "--adapter", "tpoic"], "did you mean 'topic'?"),
        (["check", "{export}", "--data", "tpoic=x"], "did you mean 'topic'?"),
        (["bench", "{export}", "--adapter", "tpoic=x"], "did you mean 'topic'?"),
        (["dynamic", "{base}", "{adapter}x", "-o", "{out}"], "did you mean '{adapter}'?"),
        (["merge", "{base}x", "-o", "{out}"], "did you mean '{base}'?"),
        (["add", "{export}", "{adapter}x"], "did you mean '{adapter}'?"),
        (["check", "{export}x"], "did you mean '{export}'?"),
        (["check", "{export}", "--data", "{base}/cofig.json"], "did you mean '{base}/config.json'?"),
        (["check", "{export}", "--data", "topic={base}/cofig.json"], "did you mean '{base}/config.json'?"),
        (["check", "{export}", "--merged", "{export}x"], "did you mean '{export}'?"),
        (["bench", "{export}", "--budget", "{base}/cofig.json"], "did you mean '{base}/config.json'?"),
        (["fleet", "{export}/adaptrs", "{base}", "-o", "{out}"], "did you mean '{export}/adapters'?"),
        (["serve", "{export}", "--allow-runtime-adapters", "{export}/adaptrs"], "did you mean '{export}/adapters'?"),
        (["bench", "{export}", "--against", "{export}/model.onx"], "did you mean '{export}/model.onnx'?"),
    ],
)
def test_a_misspelled_name_is_answered_before_anything_is_loaded(arguments, said, exports, adapters, bases, tmp_path):
    names = {
        "export": exports["bert-dynamic"],
        "base": bases["bert"],
        "adapter": adapters["topic"],
        "out": tmp_path / "o",
    }
    code = f"""
import sys
from lora_export.cli.main import main
try:
    main({[argument.format(**names) for argument in arguments]!r})
except SystemExit as done:
    heavy = {{"torch", "numpy", "transformers", "peft", "onnx", "onnxruntime"}} & set(sys.modules)
    sys.exit(f"loaded {{heavy}}" if heavy or done.code not in (2, 3) else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and said.format(**names) in done.stderr, done.stderr


def test_an_unsupported_adapter_is_refused_with_its_reasons(adapters, own, bases, tmp_path):
    folder = own(adapters["chat"])
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"layer_replication": [[0, 1]], "use_qalora": True})
    )
    text = fails(3, "merge", bases["llama"], folder, "-o", tmp_path / "out")
    assert "uses what `merge` does not export" in text and "layer_replication" in text and "use_qalora" in text
    assert "next:" in text


def test_a_provider_that_is_not_there_is_an_environment_error(exports, monkeypatch):
    from lora_export.runtime import session

    monkeypatch.setattr(session, "cuda_problem", lambda: "the NVIDIA driver is missing")
    text = fails(4, "run", exports["bert-merged"], "hello", "--provider", "cuda")
    assert "The CUDA provider was asked for and is not usable here" in text and "NVIDIA driver" in text


def test_errors_as_json(tmp_path):
    result = call("merge", tmp_path / "nowhere", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 3
    found = json.loads(result.stdout)
    assert found["error"] == "InputRefused" and found["exit_code"] == 3
    assert set(found) == {"error", "exit_code", "what", "where", "expected", "found", "next"}
    assert found["where"] == str(tmp_path / "nowhere")


def test_merge_writes_and_describes(bases, adapters, tmp_path):
    out = tmp_path / "out"
    result = call("merge", bases["classifier"], adapters["plain"], "-o", out, "--provider", "cpu", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["kind"] == "merged" and [a["name"] for a in found["adapters"]] == ["plain"]
    assert found["bytes"]["model.onnx.data"] == (out / "model.onnx.data").stat().st_size


def test_the_base_may_be_left_out(bases, adapters, tmp_path):
    out = tmp_path / "out"
    result = call("dynamic", adapters["shades"], "-o", out, "--name", "colour", "--provider", "cpu", "--quiet")
    assert result.exit_code == 0 and result.stdout == "", result.output
    manifest = read_manifest(out)
    assert manifest.base.given == str(bases["classifier"])
    assert [record.name for record in manifest.adapters] == ["colour"]
    assert (out / "adapters" / "colour.onnx_adapter").is_file()


def test_adapters_of_different_bases_need_the_base_named(adapters, tmp_path):
    text = fails(3, "dynamic", adapters["shades"], adapters["topic"], "-o", tmp_path / "out")
    assert "The adapters do not agree on a base" in text and "name the base as the first argument" in text


@pytest.mark.parametrize("command", ["merge", "dynamic"])
def test_a_dry_run_tells_all_and_writes_nothing(command, bases, adapters, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_EXPORT_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    result = call(command, bases["bert"], adapters["topic"], "-o", out, "--dry-run", "--provider", "cpu", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["mode"], found["task"], found["provider"]) == (command, "text-classification", "cpu")
    assert found["adapters"][0]["pairs"] == 4 and found["adapters"][0]["ranks"] == [4]
    assert ("adapters/topic.onnx_adapter" in found["write"]["files"]) is (command == "dynamic")
    text = call(command, bases["bert"], adapters["topic"], "-o", out, "--dry-run", "--provider", "cpu").output
    assert "for text-classification in float32, fused for cpu; wrote nothing" in text and "would " in text
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_looks_at_targets(bases, tmp_path):
    shared = ("dynamic", bases["bert"], "-o", tmp_path / "out", "--dry-run", "--provider", "cpu", "--targets")
    assert "LoRA pairs of 4 modules" in call(*shared, "query", "--targets", "value").output
    fails(2, *shared, "no_such_module")


def test_a_dry_run_refuses_what_the_export_would(bases, adapters, tmp_path):
    fails(3, "merge", bases["llama"], adapters["topic"], "-o", tmp_path / "out", "--dry-run")


@pytest.mark.parametrize(
    ("what", "words"),
    [("export", "dynamic export of"), ("adapter", "adapter topic"), ("base", "BertModel")],
)
def test_inspect_says_what_things_are(what, words, exports, adapters, bases):
    path = {"export": exports["bert-dynamic"], "adapter": adapters["topic"], "base": bases["bert"]}[what]
    assert words in call("inspect", path).output
    assert json.loads(call("inspect", path, "--json").stdout)["what"] == what


def test_inspect_shows_why_an_adapter_would_be_refused(adapters, own):
    folder = own(adapters["topic"])
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"kasa_config": {"beta": 1}}))
    found = json.loads(call("inspect", folder, "--json").stdout)
    assert (found["merge"], found["dynamic"]) == ("yes", "refused: kasa_config")


def test_check_gates_by_its_exit_code(exports, own):
    folder = own(exports["classifier-merged"])
    result = call("check", folder, "--provider", "cpu", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["verdict"] == "pass"
    shutil.copy(exports["classifier-dynamic"] / "model.onnx.data", folder / "model.onnx.data")
    data = bytearray((folder / "model.onnx.data").read_bytes())
    data[: len(data) // 2] = bytes(len(data) // 2)
    (folder / "model.onnx.data").write_bytes(bytes(data))
    text = fails(1, "check", folder, "--provider", "cpu")
    assert "FAIL" in text and "wrote" in text


def test_bench_reports_and_gates(exports, own, short_timing):
    folder = own(exports["classifier-dynamic"])
    before = {path.name for path in folder.parent.iterdir()}
    shared = ["bench", folder, "--provider", "cpu", "--shape", "2x4", "--blocks", "6"]
    result = call(*shared, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["verdict"] == "not gated"
    names = [variant["name"] for variant in found["workloads"][0]["variants"]]
    assert names == ["base", "merged", "dynamic, no adapter", "dynamic", "mixed rows", "changing rows"]
    assert all(len(v["samples_ms"]) == 12 for v in found["workloads"][0]["variants"])
    assert {path.name for path in (folder / "reports").iterdir()} == {
        "bench.html", "bench.json", "bench.junit.xml", "bench.md",
    }  # fmt: skip
    assert {path.name for path in folder.parent.iterdir()} == before, "the exports to compare with were left"
    assert {swap["name"]: len(swap["samples_us"]) for swap in found["swaps"]} == {"bound": 50, "loaded": 10}
    assert [(entry["variant"], entry["place"]) for entry in found["memory"]] == [(name, "process") for name in names]
    assert all(entry["peak_mb"] > 0 for entry in found["memory"])
    assert [entry["session"] for entry in found["placements"]] == ["base", "merged", "export"]
    assert {entry["provider"] for entry in found["placements"]} == {"CPUExecutionProvider"}
    assert "warm-up" in found["environment"]["settings"]


def test_bench_against_another_export_by_a_budget(exports, own, tmp_path, short_timing):
    """Each kind of allowance fails the command; they are all in the report, and the base of the other is not needed."""
    folder, other = own(exports["classifier-dynamic"]), tmp_path / "other"
    shutil.copytree(exports["classifier-merged"], other)
    manifest = json.loads((other / "lora_export.json").read_text())
    manifest["base"]["given"] = "gone"
    (other / "lora_export.json").write_text(json.dumps(manifest))
    budget = tmp_path / "budget.toml"
    budget.write_text(
        "[ratio]\ndynamic = 1000\nagainst = 0.001\n[swap_us]\nbound = 0.001\n[memory_mb]\nagainst = 0.001\nbase = 1e6\n"
    )
    shared = ["bench", folder, "--provider", "cpu", "--shape", "2x4", "--blocks", "6", "--budget", budget]
    text = fails(3, *shared)
    assert "against" in text and "or give --against FOLDER" in text
    assert not (folder / "reports").exists(), "refused before any work"
    result = call(*shared, "--against", other, "--max-ratio", "2000", "--json")
    assert result.exit_code == 1, result.output
    found = json.loads(result.stdout)
    ratios = [(r["variant"], r["against"], r["allowance"], r["verdict"]) for r in found["workloads"][0]["ratios"]]
    assert ratios == [
        ("merged", "base", 2000, "pass"), ("dynamic, no adapter", "base", 2000, "pass"),
        ("dynamic", "base", 1000, "pass"), ("mixed rows", "base", 2000, "pass"), ("changing rows", "base", None, "not gated"),
        ("dynamic", "against", 0.001, "fail"),
    ]  # fmt: skip
    assert [(s["name"], s["allowance_us"], s["verdict"]) for s in found["swaps"]] == [
        ("bound", 0.001, "fail"), ("loaded", None, "not gated"),
    ]  # fmt: skip
    judged = {m["variant"]: (m["allowance_mb"], m["verdict"]) for m in found["memory"]}
    assert judged["against"] == (0.001, "fail") and judged["base"] == (1e6, "pass")
    assert judged["merged"] == (None, "not gated")
    assert found["against"]["folder"] == str(other) and found["placements"][-1]["session"] == "against"
    assert any("--max-ratio 2000 for what it leaves" in note for note in found["notes"])
    budget.write_text("[device_memory_mb]\ndynamic = 1\n")
    assert "memory of a GPU, and none is used" in fails(3, *shared)


def test_a_limit_given_on_the_command_line_gates_and_is_recorded(exports, own):
    folder = own(exports["classifier-merged"])
    given = json.loads(call("check", folder, "--provider", "cpu", "--tolerance", "error=1e-12", "--json").output)
    assert given["verdict"] == "fail" and "at most 1e-12 is rounding" in given["cases"][0]["failures"][0]
    assert [limit["measure"] for limit in given["limits"] if limit["overridden"]] == ["error"]
    assert "is not MEASURE=LIMIT" in fails(2, "check", folder, "--tolerance", "error")
    assert "for a measure that there is not" in fails(2, "check", folder, "--tolerance", "errors=1")


def test_a_failed_check_annotates_the_run_and_fills_the_job_summary(exports, own, tmp_path, monkeypatch):
    folder = own(exports["classifier-merged"])
    data = bytearray((folder / "model.onnx.data").read_bytes())
    data[: len(data) // 2] = b"\xff" * (len(data) // 2)  # NaN
    (folder / "model.onnx.data").write_bytes(bytes(data))
    job_summary = tmp_path / "summary.md"
    job_summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(job_summary))
    arguments = ("check", folder, "--provider", "cpu", "--rows", 4)
    assert "::error" not in fails(1, *arguments)
    markdown = (folder / "reports/check.md").read_text("utf-8")
    assert job_summary.read_text("utf-8") == f"before\n{markdown}\n"
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert "\n::error title=lora-export check%3A plain::" in fails(1, *arguments)
    result = call(*arguments, "--json")
    assert result.exit_code == 1 and result.stderr.startswith("::error title=")
    found = json.loads(result.stdout)
    assert found["verdict"] == "fail" and found["cases"][0]["largest_error"] is None
    assert job_summary.read_text("utf-8").count("Parity check failed") == 3
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "no" / "summary.md"))
    assert "the job summary was not written" in fails(1, *arguments)


def test_bench_times_encoder_decoders(exports, own, short_timing):
    folder = own(exports["whisper-dynamic"])
    result = call("bench", folder, "--provider", "cpu", "--shape", "2x0@4", "--blocks", "6", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["workloads"][0]["name"] == "2 × 50 on 4 tokens"
    assert [v["name"] for v in found["workloads"][0]["variants"]][-1] == "changing rows"
    assert any("one step of the decoder" in note for note in found["notes"])


@pytest.mark.parametrize(("verdict", "code"), [("pass", 0), ("not gated", 0), ("fail", 1), ("ambiguous", 5)])
def test_a_verdict_is_an_exit_code(verdict, code):
    assert exit_code_of(verdict) == code


def test_run_answers(exports):
    result = call(
        "run", exports["bert-dynamic"], "one text", "another", "--adapter", "topic", "--provider", "cpu", "--json"
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert len(found["results"]) == 2
    assert sum(found["results"][0]["scores"].values()) == pytest.approx(1)
    assert len(found["results"][0]["scores"]) == 3
    text = call(
        "run", exports["llama-dynamic"], "Once", "--adapter", "chat=0.5", "--max-new-tokens", "3", "--provider", "cpu"
    )
    assert text.exit_code == 0 and text.stdout.startswith("Once")
    assert "There is no such image file" in fails(3, "run", exports["vit-dynamic"], "nowhere.png", "--provider", "cpu")


@pytest.fixture
def assistant(exports, own) -> Path:
    """A decoder with a chat template."""
    folder = own(exports["llama-dynamic"])
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}:")
    return folder


def test_run_chats_where_there_is_a_template(assistant):
    options = ("--adapter", "chat", "--max-new-tokens", "6", "--provider", "cpu")
    found = json.loads(call("run", assistant, "Bind", *options, "--json").stdout)
    raw = json.loads(call("run", assistant, "Bind", *options, "--raw", "--json").stdout)
    whole = json.loads(call("run", assistant, "<user>Bind:", *options, "--raw", "--json").stdout)
    assert (found["chat"], raw["chat"]) == (True, False)
    assert found["results"] == whole["results"] != raw["results"]
    answer, given = found["results"][0], raw["results"][0]["continuation"]
    assert answer["finish"] == "length" and len(answer["tokens"]) == 6
    assert call("run", assistant, "Bind", *options).stdout == f"{answer['continuation']}\n"
    assert call("run", assistant, "Bind", *options, "--raw").stdout == f"Bind{given}\n"
    two = call("run", assistant, "Bind", "Bind", *options).stdout
    assert two == f"Bind  →  {answer['continuation']}\n" * 2


def test_run_writes_as_the_model_writes(assistant, monkeypatch):
    parts = []
    monkeypatch.setattr(Display, "stream", lambda self, part: parts.append(part))
    result = call("run", assistant, "Bind", "--adapter", "chat", "--max-new-tokens", "6", "--provider", "cpu", "--raw")
    assert parts[0] == "Bind" and len(parts) == 7
    assert "".join(parts) == result.stdout.removesuffix("\n")


def test_an_empty_answer_says_why(assistant):
    options = ("--max-new-tokens", "6", "--provider", "cpu")
    first = json.loads(call("run", assistant, "Bind", *options, "--json").stdout)["results"][0]["tokens"][0]
    (assistant / "generation_config.json").write_text(json.dumps({"eos_token_id": first}))
    chat = call("run", assistant, "Bind", *options)
    assert chat.exit_code == 0 and "an empty answer: the first token ends it; --raw gives the model" in chat.stdout
    raw = call("run", assistant, "<user>Bind:", *options, "--raw").stdout
    assert raw == "<user>Bind:\n(an empty answer: the first token ends it: to the model, the text is complete)\n"
    (result,) = json.loads(call("run", assistant, "Bind", *options, "--json").stdout)["results"]
    assert result["continuation"] == "" and result["finish"] == "stop" and "--raw" in result["empty_because"]


def test_a_decoder_runs_without_torch_and_transformers(exports):
    code = (
        "import sys, lora_export.cli.main as m; sys.argv[1:] = ['run', sys.argv[1], 'Bind', '--adapter', 'chat',"
        "'--max-new-tokens', '2', '--provider', 'cpu']\n"
        "try: m.main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'peft', 'onnx', 'onnx_ir'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, exports["llama-dynamic"]], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Bind")


def test_encoder_decoders_are_described_and_run(exports, bases, adapters, tmp_path):
    path = exports["t5-dynamic"]
    text = call("inspect", path).output
    for line in (
        "encoder_model.onnx  ",
        "adapters/t5-all.decoder_with_past_model.onnx_adapter",
        "encoder_hidden_states",
    ):
        assert line in text
    found = json.loads(call("inspect", path, "--json").stdout)
    assert list(found["graphs"]["encoder_model"]["outputs"]) == ["last_hidden_state"]
    out = tmp_path / "out"
    found = json.loads(call("dynamic", bases["t5"], adapters["t5-all"], "-o", out, "--dry-run", "--json").stdout)
    assert "decoder_with_past_model.onnx" in found["write"]["files"] and not out.exists()
    assert "adapters/t5-all.encoder_model.onnx_adapter" in found["write"]["files"]
    options = ("--max-new-tokens", "3", "--provider", "cpu", "--json")
    found = json.loads(call("run", path, "one text", "another", "--adapter", "t5-all", *options).stdout)
    assert [len(result["tokens"]) <= 3 for result in found["results"]] == [True, True]
    assert all(isinstance(result["text"], str) for result in found["results"])
    assert "There is no such WAV file" in fails(3, "run", exports["whisper-dynamic"], "nowhere.wav", *options)


def test_the_installed_command_prints_errors_on_stderr_and_results_on_stdout(adapters, tmp_path):
    environment = os.environ | {"NO_COLOR": "1"}
    done = subprocess.run(
        [SCRIPT, "inspect", adapters["topic"]], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 0 and done.stdout.startswith("adapter topic") and done.stderr == ""
    done = subprocess.run([SCRIPT, "inspect", tmp_path], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 3 and done.stdout == "" and done.stderr.startswith("error: The folder holds no export")


def test_without_click_the_command_says_what_it_needs(monkeypatch, capsys):
    from lora_export.cli import entry

    monkeypatch.setattr(entry.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        entry.main()
    said = capsys.readouterr().err
    assert ended.value.code == 4 and "pip install click" in said and "from lora_export import AdapterSession" in said


def piped_to_nobody(*arguments: object, both: bool = False) -> tuple[int, str]:
    """The exit code, and what is on standard error, of a command whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [SCRIPT, *map(str, arguments)],
            stdout=writer,
            stderr=writer if both else subprocess.PIPE,
            text=True,
            timeout=120,
            env=os.environ | {"NO_COLOR": "1"},
        )
    finally:
        os.close(writer)
    return done.returncode, done.stderr or ""


@pytest.mark.parametrize("both", [False, True])
def test_a_reader_that_has_gone_does_not_change_the_verdict(both, exports, own, tmp_path):
    """`lora-export verify X | head -1` under pipefail: a gate that failed stays red."""
    sound, damaged = exports["bert-dynamic"], own(exports["bert-dynamic"])
    (damaged / "adapters" / "topic.onnx_adapter").write_bytes(b"another")
    for options in ((), ("--json",)):
        assert piped_to_nobody("verify", sound, *options, both=both) == (0, "")
        assert piped_to_nobody("verify", damaged, *options, both=both) == (1, "")
    code, said = piped_to_nobody("verify", tmp_path, both=both)
    assert code == 3 and (both or said.startswith("error: The folder holds no export"))


def test_a_defect_says_where_to_report_it_and_with_which_versions(monkeypatch):
    """It is no gate that failed: its exit code is its own."""
    monkeypatch.delenv("LORA_EXPORT_DEBUG", raising=False)

    def broken(path: str) -> dict:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("lora_export.export.describe.inspect_path", broken)
    for options in ((), ("--json",)):
        result = CliRunner().invoke(main, ["inspect", "anything", *options])
        assert result.exit_code == 6 and "Traceback" not in result.output
        said = result.stdout if options else result.stderr
        assert "a defect of lora-export or of one of its libraries, not of your input" in said
        assert "ZeroDivisionError: a defect" in said and "test_cli.py:" in said
        assert re.search(r"https://\S+/issues", said)
        for name in ("python", "lora-export", "torch", "transformers", "peft", "onnxruntime"):
            assert re.search(rf"{name} \d+\.\d+", said), name
    monkeypatch.setenv("LORA_EXPORT_DEBUG", "1")
    assert "Traceback (most recent call last)" in CliRunner().invoke(main, ["inspect", "anything"]).stderr


def test_what_the_system_refuses_is_no_gate_either(monkeypatch):
    def denied(path: str) -> dict:
        raise PermissionError(13, "Permission denied", "/root/base")

    monkeypatch.setattr("lora_export.export.describe.inspect_path", denied)
    said = fails(4, "inspect", "anything")
    assert "The system refused what the command needs" in said and "/root/base" in said and "Permission denied" in said
