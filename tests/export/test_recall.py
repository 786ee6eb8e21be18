"""What was planned before is taken from the cache: only if headers decide it, and with the numbers of today."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_export import pipeline
from lora_export.errors import InputRefused
from lora_export.export.plan import Request, make_plan
from lora_export.export.recall import KeptConfig, _plan_fields, _plan_of
from lora_export.pipeline import ExportOptions, export


class Planned(Exception):
    """Raised in place of planning."""


def refuse_to_plan(request: Request) -> None:
    raise Planned


@pytest.fixture
def setting(bases, adapters, tmp_path, monkeypatch):
    """`setting(base, adapter)` copies both and gives `(run, base, adapter)`; `run()` exports them and gives the files,
    and `run(planned=False)` fails if it plans."""
    monkeypatch.setenv("LORA_EXPORT_CACHE", str(tmp_path / "cache"))

    def make(base: str, adapter: str, mode: str = "dynamic"):
        folders = [tmp_path / "base", tmp_path / "adapter"]
        for source, target in zip((bases[base], adapters[adapter]), folders, strict=True):
            shutil.copytree(source, target)
        request = Request(str(folders[0]), ((str(folders[1]), "a"),), mode)

        def run(*, planned: bool = True, **options: object) -> dict[str, bytes]:
            out = tmp_path / "out"
            with monkeypatch.context() as patch:
                if not planned:
                    patch.setattr(pipeline, "make_plan", refuse_to_plan)
                export(request, ExportOptions(out, overwrite=True, **options))
            return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}

        return run, *folders

    return make


def changed(file: Path, change) -> None:
    save_file({key: change(key, tensor) for key, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def test_a_recalled_export_has_the_numbers_of_today_and_their_refusals(setting):
    """A classifier's whole head beside pairs, other numbers under the same headers, then one that is none."""
    run, _, adapter = setting("vit", "sights")
    first = run()
    assert run(planned=False) == first
    weights = adapter / "adapter_model.safetensors"
    changed(weights, lambda key, tensor: tensor * 1.5)
    recalled = run(planned=False)
    assert recalled != first
    assert recalled == run(use_cache=False)
    changed(weights, lambda key, tensor: torch.full_like(tensor, torch.nan) if "lora_B" in key else tensor)
    messages = []
    for options in ({"planned": False}, {"use_cache": False}):
        with pytest.raises(InputRefused, match="The adapter holds numbers that are not finite") as refused:
            run(**options)
        messages.append(str(refused.value))
    assert messages[0] == messages[1]


def test_whatever_planning_reads_makes_it_plan_again(setting):
    run, base, adapter = setting("vit", "sights", "merge")
    run()
    run(planned=False)
    config = json.loads((adapter / "adapter_config.json").read_text())
    changes = {
        "an option": lambda: (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 3})),
        "a card": lambda: (adapter / "README.md").write_text("a card"),
        "labels": lambda: (adapter / "config.json").write_text(
            json.dumps({"id2label": {str(n): "x" for n in range(5)}})
        ),
        "the base's settings": lambda: (base / "preprocessor_config.json").write_text("{}"),
        "a header": lambda: changed(base / "model.safetensors", lambda key, tensor: tensor.double()),
    }
    for what, change in changes.items():
        change()
        with pytest.raises(Planned):
            run(planned=False)
            pytest.fail(what)
    with pytest.raises(Planned):
        run(planned=False, use_cache=False)


def test_a_record_is_left_alone_without_its_graph_or_where_it_is_damaged(setting, tmp_path):
    run, base, _ = setting("vit", "sights")
    first = run()
    (record,) = (tmp_path / "cache").glob("*.json")
    content = record.read_bytes()
    record.write_bytes(content.replace(b"float32", b"float16"))
    with pytest.raises(Planned):
        run(planned=False)
    assert not record.exists()
    assert run() == first and record.read_bytes() == content
    # The graph holds the norms, so with others it is another.
    changed(base / "model.safetensors", lambda key, tensor: tensor + 1 if "norm" in key else tensor)
    with pytest.raises(Planned):
        run(planned=False)
    assert run() != first
    run(planned=False)


def test_nothing_is_kept_of_what_numbers_decide(setting, tmp_path):
    """An adapter that brings a copy of the base's embedding: whether it differs is seen in its numbers."""
    run, _, adapter = setting("llama", "chat", "merge")
    tensors = load_file(adapter / "adapter_model.safetensors")
    embedding = load_file(tmp_path / "base" / "model.safetensors")["model.embed_tokens.weight"]
    key = "base_model.model.model.embed_tokens.weight"
    save_file(tensors | {key: embedding}, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    run()
    assert not list((tmp_path / "cache").glob("*.json"))


def test_a_kept_config_has_no_defaults_for_what_was_not_kept():
    config = KeptConfig({"a": 1}, {"num_labels": 2}, KeptConfig({}, {"eos_token_id": None}))
    assert config.to_dict() == {"a": 1} and config.num_labels == 2
    assert getattr(config.get_text_config(), "eos_token_id", 5) is None
    with pytest.raises(LookupError, match="does not have the config's sliding_window"):
        getattr(config, "sliding_window", None)
    with pytest.raises(LookupError, match="no text config"):
        config.get_text_config().get_text_config()


def test_a_config_without_labels_is_kept_as_it_is(bases):
    """PVT's: its `id2label` is None."""
    request = Request(str(bases["vit"]), (), "merge")
    plan = make_plan(request)
    plan.config.id2label = plan.config.label2id = None
    kept = json.loads(json.dumps(_plan_fields(plan)))
    found = _plan_of(kept, request, plan.checkpoint, folders=()).config
    assert found.id2label is None and found.label2id is None
