"""What `--quantize` refuses, before any work, and what a dry run says of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from catalogue import INT4
from click.testing import CliRunner

from lora_export.cli.main import main
from lora_export.errors import InputRefused, UsageProblem
from lora_export.export.describe import describe_plan
from lora_export.export.plan import Request, make_plan


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
    done = CliRunner().invoke(main, ["merge", str(tmp_path), "--provider", "cpu", "--block-size", "64", "-o", "out"])
    assert done.exit_code == 2 and "--block-size says how to quantize" in done.output + (done.stderr or "")
