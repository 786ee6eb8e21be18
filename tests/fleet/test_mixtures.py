"""What one list may hold: ranks up to 512, heads of many sizes, mixed kinds, duplicates, adapters of another base."""

from __future__ import annotations

import json
import shutil

import tiny
from command_line import call
from peft import LoraConfig

from lora_export.artifact import read_manifest

HEADS, RANKS = (2, 3, 40), (1, 512)
LINEAR = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}


def test_ranks_heads_kinds_and_duplicates_share_a_fleet_and_a_stranger_is_refused(bases, adapters, tmp_path):
    listed, out = tmp_path / "list", tmp_path / "out"

    def train(name: str, n_labels: int | None = None, **options: object) -> None:
        config = LoraConfig(**(LINEAR | options))
        tiny.trained(bases["classifier"], listed / name, "BertForSequenceClassification", config, n_labels)

    for n in HEADS:
        train(f"head{n}", n, r=2)
    for rank in RANKS:
        train(f"rank{rank}", r=rank, lora_alpha=rank)
    train("dora", r=4, use_dora=True)
    train("bias", r=4, bias="all")
    train("own-ranks", r=4, rank_pattern={"0.attention.self.query": 9}, alpha_pattern={"value": 32})
    shutil.copytree(listed / "head3", listed / "again")
    shutil.copytree(adapters["chat"], listed / "stranger")
    result = call("fleet", listed, bases["classifier"], "-o", out, "--provider", "cpu", "--rows", 3, "--workers", 1)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "reports/fleet.json").read_text())
    outcomes = {each["name"]: each["outcome"] for each in report["adapters"]}
    assert outcomes.pop("stranger") == "refused" and set(outcomes.values()) == {"served"} and len(outcomes) == 9
    (stranger,) = (each for each in report["adapters"] if each["name"] == "stranger")
    assert (
        "base" in stranger["reason"]
        and "check that the base is the one it was trained on" in stranger["detail"]["next"]
    )
    manifest = read_manifest(out)
    records = {record.name: record for record in manifest.adapters}
    assert {name: record.n_labels for name, record in records.items() if name.startswith("head")} == {
        f"head{n}": n for n in HEADS
    }
    assert [max(records[f"rank{rank}"].ranks) for rank in RANKS] == list(RANKS)
    assert manifest.files["adapters/again.onnx_adapter"] == manifest.files["adapters/head3.onnx_adapter"]
