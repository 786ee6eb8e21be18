"""Folders of sentence-transformers, from export to what is served: their embedding is an output of the graph."""

from __future__ import annotations

import builtins
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from base.test_sentence_folder import write_dense, write_head
from bench.test_peer import another_tools, graph_with
from click.testing import CliRunner
from onnx import TensorProto
from peft import PeftModel
from transformers import AutoModel, AutoTokenizer

from lora_export import AdapterSession
from lora_export.artifact import read_manifest, write_manifest
from lora_export.bench.plan import BenchOptions, plan_bench
from lora_export.bench.run import _notes
from lora_export.carried import is_carried
from lora_export.check.context import CheckOptions
from lora_export.cli.main import main
from lora_export.errors import InputRefused, UsageProblem
from lora_export.export.plan import Request, make_plan
from lora_export.export.pooling import pooling_again, without_source
from lora_export.export.records import hashed_sources
from lora_export.integrity.sources import SourceOverrides, locate_sources
from lora_export.integrity.verify import verify
from lora_export.pipeline import AddOptions, ExportOptions, add_adapter, bench, check, export, remove_adapters
from lora_export.sentence import Dense, Pooling
from lora_export.trial import run_trial
from lora_export.verdict import Verdict

TEXTS = ["Open a socket.", "Größe, and a longer text than the other one."]


@pytest.fixture(scope="module")
def served(tmp_path_factory, bases, adapters):
    """A base below its folder (`0_Transformer`), with Dense and Normalize; its dynamic export with one adapter."""
    folder = tmp_path_factory.mktemp("sentences")
    root = write_head(folder / "base", "Normalize", place="0_Transformer")
    shutil.copytree(bases["bert"], root / "0_Transformer")
    return root, _exported(folder / "out", root, adapters["features"], "dynamic")


@pytest.fixture(scope="module")
def merged(tmp_path_factory, bases, adapters):
    """An adapter's own folder, as release 6 saves it, on a base that says nothing; its merged export."""
    folder = tmp_path_factory.mktemp("trained")
    root = folder / "adapter"
    shutil.copytree(adapters["features"], root)
    write_head(root, pooling={"embedding_dimension": 64, "pooling_mode": ["cls", "max"]}, modern=True)
    modules = (root / "modules.json").read_text().replace("]", ', {"idx": 2, "name": "2", "path": "2_Dense", '
              '"type": "sentence_transformers.base.modules.dense.Dense"}]')  # fmt: skip
    (root / "modules.json").write_text(modules)
    size = AutoModel.from_pretrained(bases["bert"]).config.hidden_size
    write_dense(root / "2_Dense", {}, (4, 2 * size))
    return root, _exported(folder / "out", bases["bert"], root, "merge")


def _exported(out: Path, base: Path, adapter: Path, mode: str) -> Path:
    export(Request(str(base), ((str(adapter), "a"),), mode, pooling="auto"), ExportOptions(out))
    return out


def _states(base: Path, adapter: Path) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = AutoTokenizer.from_pretrained(base)(TEXTS, return_tensors="pt", padding=True)
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        return model(**tokens).last_hidden_state, tokens["attention_mask"][:, :, None].to(torch.float32)


def test_the_export_embeds_as_peft_and_the_folder_do(served, adapters):
    root, out = served
    states, mask = _states(root / "0_Transformer", adapters["features"])
    expected = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1)).numpy()
    found = run_trial(out, TEXTS, {"a": 1.0}, provider="cpu", max_new_tokens=0)["results"]
    np.testing.assert_allclose([each["sentence_embedding"] for each in found], expected, atol=1e-5)
    tokens = dict(AutoTokenizer.from_pretrained(out)(TEXTS, return_tensors="np", padding=True))
    rows = AdapterSession(out, "cpu").run(tokens, [None, "a"], outputs=["sentence_embedding"])["sentence_embedding"]
    np.testing.assert_allclose(rows[1], expected[1], atol=1e-5)
    assert np.abs(rows[0] - expected[0]).max() > 0.01


def test_check_compares_it_and_sees_a_graph_that_pools_otherwise(served, tmp_path):
    _, out = served
    report, _ = check(out, SourceOverrides(), CheckOptions(provider="cpu", n_rows=8))
    assert report.verdict is Verdict.PASS
    assert any(case.name == "a: last_hidden_state" for case in report.cases)
    damaged = tmp_path / "damaged"
    shutil.copytree(out, damaged)
    text = (damaged / "lora_export.json").read_text()
    (damaged / "lora_export.json").write_text(text.replace('"mean"', '"cls"'))
    report, _ = check(damaged, SourceOverrides(), CheckOptions(provider="cpu", n_rows=8))
    assert report.verdict is Verdict.FAIL


def test_bench_times_the_embedding_of_base_and_merged_form_too(served, tmp_path, short_timing):
    out, other = tmp_path / "out", another_tools(served[1], tmp_path / "other")
    shutil.copytree(served[1], out)
    report, files = bench(out, SourceOverrides(), BenchOptions("cpu", [(2, 4, 0)], blocks=6, against=other))
    by_variant = {each.variant: each for each in report.differences}
    assert by_variant["base"].outputs == ("last_hidden_state", "pooler_output", "sentence_embedding")
    assert by_variant["base"].largest < 1e-5, "the other has no adapter"
    (workload,) = report.workloads
    assert [variant.name for variant in workload.variants] == [
        "base", "merged", "dynamic, no adapter", "dynamic", "against",
    ]  # fmt: skip
    said = "A run gives last_hidden_state, pooler_output and sentence_embedding (mean, length 1), of every variant."
    assert said in report.notes and said in files["html"].read_text("utf-8")
    assert not any("The other graph gives" in note for note in report.notes)


def test_bench_says_where_only_one_graph_makes_an_embedding(served, tmp_path):
    inputs = {spec.name: (TensorProto.INT64, ["rows", "tokens"]) for spec in read_manifest(served[1]).contract.inputs}
    other = graph_with(inputs, tmp_path / "other.onnx")
    plan = plan_bench(served[1], BenchOptions("cpu", [(2, 4, 0)], against=other))
    assert "The other graph gives no sentence_embedding: it does less" in " ".join(_notes(plan, "cpu"))
    pooled = plan_bench(served[1], BenchOptions("cpu", [(2, 4, 0)], against=served[1]))
    assert not any("The other graph" in note for note in _notes(pooled, "cpu"))
    plain = replace(pooled, manifest=replace(pooled.manifest, sentence_embedding=None))
    assert "The other graph gives a sentence_embedding" in " ".join(_notes(plain, "cpu"))


def test_the_manifest_says_what_the_output_is_and_verify_knows_its_files(served):
    root, out = served
    manifest = read_manifest(out)
    assert manifest.sentence_embedding.described == "mean, length 1" and manifest.sentence_embedding.source == ""
    assert {"modules.json", "1_Pooling/config.json", "0_Transformer/config.json"} <= manifest.base.files.keys()
    assert manifest.contract.outputs[-1].name == "sentence_embedding"
    assert verify(out, SourceOverrides()).passed
    assert pooling_again(manifest.sentence_embedding, root / "0_Transformer", {}) == str(root)


def test_the_server_answers_with_the_graphs_own(served, adapters):
    from lora_export.serve.batching import Row, Ticket
    from lora_export.serve.encoders import Encoder
    from lora_export.serve.models import Models
    from lora_export.serve.options import Pooling as ServePooling
    from lora_export.serve.options import ServeOptions

    root, out = served
    models = Models(out, ServeOptions(provider="cpu", n_threads=1))
    rows = [Row("a", ids, Ticket(0)) for ids in models.settings.texts.encode(TEXTS)]
    own = np.stack([each.values for each in Encoder(models, None, normalize=None).run(rows)])
    expected = [
        each["sentence_embedding"]
        for each in run_trial(out, TEXTS, {"a": 1.0}, provider="cpu", max_new_tokens=0)["results"]
    ]
    np.testing.assert_allclose(own, expected, atol=1e-5)
    states, _ = _states(root / "0_Transformer", adapters["features"])
    first = Encoder(models, ServePooling.FIRST, normalize=False).run(rows)
    np.testing.assert_allclose([each.values for each in first], states[:, 0], atol=1e-4)


def test_an_adapters_own_folder_says_how_and_its_linear_layer_comes_along(merged, bases):
    root, out = merged
    states, mask = _states(bases["bert"], root)
    pooled = torch.cat([states[:, 0], states.masked_fill(mask == 0, -1e9).amax(1)], dim=1)
    layer = safetensors.numpy.load_file(root / "2_Dense" / "model.safetensors")
    expected = np.tanh(pooled.numpy() @ layer["linear.weight"].T + layer["linear.bias"])
    found = run_trial(out, TEXTS, {}, provider="cpu", max_new_tokens=0)["results"]
    np.testing.assert_allclose([each["sentence_embedding"] for each in found], expected, atol=1e-5)
    report, _ = check(out, SourceOverrides(), CheckOptions(provider="cpu", n_rows=8))
    assert report.verdict is Verdict.PASS
    manifest = read_manifest(out)
    assert isinstance(manifest.sentence_embedding.layers[0], Dense) and manifest.sentence_embedding.source == "a"
    assert "2_Dense/model.safetensors" in manifest.adapters[0].source.files


@pytest.fixture
def opened_files(monkeypatch) -> list[Path]:
    """The files that Python opens."""
    found = []

    def spied(file, *arguments, **options):
        if isinstance(file, str | Path):
            found.append(Path(file).resolve())
        return plain(file, *arguments, **options)

    plain = io.open
    monkeypatch.setattr(io, "open", spied)
    monkeypatch.setattr(builtins, "open", spied)
    return found


@pytest.mark.parametrize("pooling", ["auto", "none"])
@pytest.mark.parametrize("place", ["", "0_Transformer"])
def test_every_file_that_a_plan_reads_is_in_the_record_of_its_source(
    pooling, place, bases, adapters, tmp_path, opened_files
):
    folders = {"base": bases["bert"], "own": adapters["features"], "other": adapters["features"]}
    for name, source in folders.items():
        root = write_head(tmp_path / name, "Normalize", "Dense", place=place, dense={"bias": False})
        (root / "2_Normalize").mkdir()
        (root / "2_Normalize/config.json").write_text("{}")
        shutil.copytree(source, root / place, dirs_exist_ok=True)
        (root / place / "sentence_bert_config.json").write_text('{"max_seq_length": 64}')
        (root / "config_sentence_transformers.json").write_text("{}")
        if name != "base":
            (root / place / "config.json").write_text('{"id2label": {"0": "a"}}')
    of_base = [] if pooling == "none" else [[]]
    for given in (["own", "other"], *of_base):
        opened_files.clear()
        asked = tuple((str(tmp_path / name), name) for name in given)
        plan = make_plan(Request(str(tmp_path / "base"), asked, "dynamic", "feature-extraction", pooling=pooling))
        of_sources = [path for path in opened_files if path.is_relative_to(tmp_path) and path.name != "README.md"]
        read = {path for path in of_sources if not is_carried(path.name)}  # what is carried is among the export's files
        with hashed_sources(plan) as hashed:
            sources = hashed()
        files = dict(
            zip(("base", *given), (sources.base.files, *(each.files for each in sources.adapters)), strict=True)
        )
        recorded = {tmp_path / name / file for name, each in files.items() for file in each}
        assert read - recorded == set() and len(read) >= len(files)
        if pooling == "auto":
            assert {"modules.json", "1_Pooling/config.json", "3_Dense/model.safetensors", "2_Normalize/config.json",
                    "config_sentence_transformers.json"} <= files["own" if given else "base"].keys()  # fmt: skip


def test_an_adapter_that_is_added_has_its_folders_settings_in_its_record(served, adapters, tmp_path):
    copy, root = tmp_path / "out", write_head(tmp_path / "b", "Normalize")
    shutil.copytree(served[1], copy)
    shutil.copytree(adapters["features"], root, dirs_exist_ok=True)
    (root / "sentence_bert_config.json").write_text('{"max_seq_length": 64}')
    said = []
    add_adapter(copy, ((str(root), "b"),), remark=said.append)
    assert "the texts of adapter 'b' are cut to 64 tokens, which hosts must do" in said
    files = read_manifest(copy).adapter("b").source.files
    assert {"modules.json", "1_Pooling/config.json", "sentence_bert_config.json"} <= files.keys()
    assert verify(copy, SourceOverrides()).passed
    (root / "1_Pooling/config.json").write_text("{}")
    with pytest.raises(InputRefused, match="This adapter is not the one that was exported"):
        locate_sources(read_manifest(copy), SourceOverrides())


def test_an_adapter_of_another_embedding_is_not_added(served, merged, tmp_path):
    copy = tmp_path / "out"
    shutil.copytree(served[1], copy)
    with pytest.raises(InputRefused, match="was trained with another embedding than the export makes") as caught:
        add_adapter(copy, ((str(merged[0]), "b"),))
    assert "expected: mean, length 1" in str(caught.value) and "cls + max" in str(caught.value)


def test_the_adapter_whose_folder_says_how_stays_or_another_takes_its_place(served, adapters, tmp_path):
    copy = tmp_path / "out"
    shutil.copytree(served[1], copy)
    manifest = read_manifest(copy)
    write_manifest(copy, replace(manifest, sentence_embedding=replace(manifest.sentence_embedding, source="a")))
    with pytest.raises(InputRefused, match="The folder of adapter 'a' says how the export makes its embedding"):
        remove_adapters(copy, ["a"])
    with pytest.raises(InputRefused, match="The folder of adapter 'a' says"):
        add_adapter(copy, ((str(adapters["features"]), "a"),), options=AddOptions(replace=True))
    (own,), embedding = manifest.adapters, replace(manifest.sentence_embedding, source="a")
    says = replace(own, name="b", source=replace(own.source, files=own.source.files | {"modules.json": ""}))
    with pytest.raises(InputRefused, match="The folder of adapter 'a' says"):
        without_source(embedding, ["a"], [own, says])  # it says where its Transformer lies, and no more
    files = says.source.files | {"1_Pooling/config.json": ""}
    says = replace(says, source=replace(own.source, files=files))
    assert without_source(embedding, ["a"], [own, says]).source == "b"
    assert without_source(embedding, ["b"], [own]) == embedding
    assert without_source(replace(embedding, layers=()), ["a"], []).source is None


def test_adapters_of_different_embeddings_are_refused_before_any_work(merged, served, adapters, bases, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(adapters["features"], other)
    write_head(other)
    both = ((str(merged[0]), "a"), (str(other), "b"))
    with pytest.raises(InputRefused, match="The adapters were trained with different embeddings"):
        make_plan(Request(str(bases["bert"]), both, "dynamic", pooling="auto"))
    assert make_plan(Request(str(bases["bert"]), both, "dynamic", pooling="mean")).head.embedding.pooling == (
        Pooling.MEAN,
    )
    with pytest.raises(InputRefused, match="Neither the base nor an adapter says how"):
        make_plan(Request(str(bases["bert"]), ((str(adapters["features"]), "a"),), "dynamic", pooling="auto"))
    with pytest.raises(UsageProblem, match="--pooling is for embeddings of texts"):
        make_plan(Request(str(bases["bert"]), (), "merge", task="fill-mask", pooling="mean"))
    plain = make_plan(Request(str(served[0]), (), "merge", task="feature-extraction"))
    assert plain.head is None and "--pooling auto" in plain.remarks[0]


def test_what_a_host_must_do_to_a_text_is_said(bases, tmp_path):
    root = write_head(tmp_path / "base", place="0_Transformer")
    shutil.copytree(bases["bert"], root / "0_Transformer")
    (root / "0_Transformer" / "sentence_bert_config.json").write_text('{"max_seq_length": 64, "do_lower_case": true}')
    prompts = {"prompts": {"query": "query: ", "passage": "passage: "}, "default_prompt_name": "query"}
    (root / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    said = " ".join(make_plan(Request(str(root), (), "merge", pooling="auto")).remarks)
    assert "lower case" in said and "cut to 64 tokens" in said and "begin with the prompt 'query: '" in said


def test_the_option_is_the_command_lines(merged, bases, tmp_path):
    given = ["merge", str(bases["bert"]), str(merged[0]), "--pooling", "auto", "-o", str(tmp_path / "o"), "--dry-run"]
    found = CliRunner().invoke(main, given)
    assert found.exit_code == 0 and "embeddings by cls + max, linear 64 → 4 (Tanh)" in found.output, found.output
    given[given.index("auto")] = "median"
    found = CliRunner().invoke(main, given)
    assert found.exit_code == 2 and "'weightedmean'" in found.output
