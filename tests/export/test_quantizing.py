"""What `--quantize` refuses, before any work, and what a dry run says of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from catalogue import INT4
from click.testing import CliRunner

from lora_export.cli.main import main
from lora_export.errors import InputRefused, UsageProblem
from lora_export.export.describe import describe_plan
from lora_export.export.plan import Request, make_plan
from lora_export.quantization import Method, Quantization

CHOSEN = (Method.K_QUANT, Method.HQQ)


def test_a_start_that_changes_the_base_is_refused_by_dynamic_alone(bases, adapters, tmp_path):
    adapter = Path(shutil.copytree(adapters["chat"], tmp_path / "chat"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    request = Request(str(bases["llama"]), ((str(adapter), "chat"),), "dynamic", quantization=INT4)
    with pytest.raises(InputRefused, match="what `dynamic --quantize` does not take") as refused:
        make_plan(request)
    assert "init_lora_weights = 'pissa'" in refused.value.where and "merge it" in refused.value.next_step
    make_plan(replace(request, mode="merge"))


def test_rows_of_a_head_want_it_in_floats_and_a_dry_run_names_the_bytes(bases, adapters, tmp_path):
    def described(**how: object) -> dict:
        request = Request(str(bases["llama"]), ((str(adapters["tokens"]), "tokens"),), "dynamic", **how)
        return describe_plan(request, tmp_path / "out")

    with pytest.raises(InputRefused, match="trainable_token_indices on a head") as refused:
        described(quantization=INT4)
    assert refused.value.where == "lm_head.weight" and "--keep" in refused.value.next_step
    kept = described(quantization=replace(INT4, keep=("lm_head",)))
    assert kept["quantization"].startswith("int4 (rtn, blocks of 32, symmetric")
    assert kept["write"]["weight_bytes"] < 0.5 * described()["write"]["weight_bytes"]
    with pytest.raises(UsageProblem, match="--keep 'head' names no linear module"):
        described(quantization=replace(INT4, keep=("lm_head", "head")))


def test_options_of_quantizing_need_it(tmp_path):
    asked = ["merge", str(tmp_path), "--provider", "cpu", "-o", "out"]
    done = CliRunner().invoke(main, [*asked, "--block-size", "64"])
    assert done.exit_code == 2 and "--block-size says how to quantize" in done.output + (done.stderr or "")
    done = CliRunner().invoke(main, [*asked, "--quantize", "int4", "--quantize-method", "hqq", "--accuracy-level", "4"])
    assert done.exit_code == 2 and "rounds no activations" in done.output + (done.stderr or "")


def test_what_onnx_runtimes_methods_cannot_do_is_refused_before_any_work(bases, tmp_path):
    def described(**how: object) -> dict:
        request = Request(str(bases["llama"]), (), "merge", quantization=Quantization(**how))
        return describe_plan(request, tmp_path / "out")

    with pytest.raises(UsageProblem, match="no zero for a block whose numbers all have one sign"):
        described(method=Method.K_QUANT, block_size=16)
    with pytest.raises(UsageProblem, match="in 4 bits only"):
        described(method=Method.HQQ, bits=8)
    sizes = {method: described(method=method)["write"]["weight_bytes"] for method in (Method.RTN, *CHOSEN)}
    assert sizes[Method.RTN] < sizes[Method.K_QUANT] < sizes[Method.HQQ]
    assert described(method=Method.HQQ)["quantization"] == "int4 (hqq, blocks of 32, asymmetric, accuracy level 0)"


def test_quantizing_leaves_pythons_logging_as_it_was(exports):
    """Run apart, as ONNX Runtime's module sets it up once."""
    code = (
        "import logging, numpy as np; from lora_export.base.recipe import Part, Quantized; "
        "from lora_export.export.integers import quantized; from lora_export.quantization import Method, Quantization; "
        "how = Quantized.of(Quantization(method=Method.HQQ), Part.INTEGERS, 'float32'); "
        "quantized(np.ones((32, 4), np.float32), how); print(logging.root.handlers, logging.root.level)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "30"] and not done.stderr
