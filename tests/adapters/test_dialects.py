"""The same adapter in every format gives the same export; scales are each format's own; names fit or are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from catalogue import ADAPTERS
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import adapter as tiny_adapter

from lora_export.adapters.foreign import peft_folder
from lora_export.check.context import CheckOptions
from lora_export.errors import InputRefused

KEY = "base_model.model."
OPTIONS = {
    "llama": {
        "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 2},
    },
    "gpt2": {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    "bert": {"r": 2, "lora_alpha": 1, "target_modules": ["query", "output.dense"]},
}  # fmt: skip
CLASSES = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel", "bert": "BertModel"}


def scale_of(base: str, module: str) -> float:
    """What PEFT's documentation says of `OPTIONS`, written out."""
    if base == "gpt2":
        return 2.0
    if base == "bert":
        return 0.5
    if module == "model.layers.1.self_attn.q_proj":
        return 0.5
    return 4.0 if "down_proj" in module else 2.0


@pytest.fixture(scope="module")
def trained(bases, tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    return {name: tiny_adapter(bases[name], root / name, CLASSES[name], **OPTIONS[name]) for name in OPTIONS}


def pairs_of(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B by module, as PEFT saved them."""
    tensors = load_file(folder / "adapter_model.safetensors")
    ends = {name.removeprefix(KEY).removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name}
    return {m: (tensors[f"{KEY}{m}.lora_A.weight"], tensors[f"{KEY}{m}.lora_B.weight"]) for m in sorted(ends)}


def write_kohya(folder: Path, pairs, scale, prefix: str = "lora_te_") -> Path:
    tensors = {}
    for module, (a, b) in pairs.items():
        name = prefix + module.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
        if scale is not None:
            tensors[f"{name}.alpha"] = torch.tensor(scale(module) * len(a))
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "mine.safetensors")
    return folder / "mine.safetensors"


def write_diffusers(folder: Path, pairs, scale) -> Path:
    tensors = {}
    for module, (a, b) in pairs.items():
        tensors |= {f"text_encoder.{module}.lora.down.weight": a, f"text_encoder.{module}.lora.up.weight": b}
        tensors[f"text_encoder.{module}.alpha"] = torch.tensor(scale(module) * len(a))
    folder.mkdir(parents=True)
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")
    return folder


def write_bare(folder: Path, pairs, scale) -> Path:
    tensors = {}
    for module, (a, b) in pairs.items():
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        tensors[f"{module}.alpha"] = torch.tensor(scale(module) * len(a))
    folder.mkdir(parents=True)
    save_file(tensors, folder / "mine.safetensors")
    return folder / "mine.safetensors"


def write_mlx(folder: Path, pairs, scale: float, rank: int, base: Path, **settings) -> Path:
    tensors = {}
    for module, (a, b) in pairs.items():
        tensors |= {f"{module}.lora_a": a.T.contiguous(), f"{module}.lora_b": b.T.contiguous()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapters.safetensors")
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "model": str(base), "num_layers": 2, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    return folder


def packed(bases, base: str, adapter: Path, out: Path) -> bytes:
    from lora_export.export.plan import Request
    from lora_export.pipeline import ExportOptions, export

    export(Request(str(bases[base]), ((str(adapter), "mine"),), "dynamic"), ExportOptions(out))
    return (out / "adapters/mine.onnx_adapter").read_bytes()


@pytest.mark.parametrize("base", OPTIONS)
def test_every_format_packs_to_the_same_bytes(base, bases, trained, tmp_path):
    pairs = pairs_of(trained[base])
    expected = packed(bases, base, trained[base], tmp_path / "peft")

    def scale(module):
        return scale_of(base, module)

    written = {
        "kohya": write_kohya(tmp_path / "k", pairs, scale),
        "kohya-bare-prefix": write_kohya(tmp_path / "k2", pairs, scale, prefix="lora_"),
        "diffusers": write_diffusers(tmp_path / "d", pairs, scale),
        "bare": write_bare(tmp_path / "b", pairs, scale),
    }
    for name, adapter in written.items():
        assert packed(bases, base, adapter, tmp_path / name) == expected, name


def test_mlx_packs_to_the_same_bytes(bases, adapters, tmp_path):
    options = ADAPTERS["chat"].options
    assert (options["r"], options["lora_alpha"]) == (4, 8)
    mlx = write_mlx(tmp_path / "mlx", pairs_of(adapters["chat"]), 2.0, 4, bases["llama"])
    assert packed(bases, "llama", mlx, tmp_path / "b") == packed(bases, "llama", adapters["chat"], tmp_path / "a")


def delta_by_loops(a, b, scale: float) -> list[list[float]]:
    """`scale · Σ_r b[o, r] a[r, i]`, A `[rank, in]` and B `[out, rank]` as nested lists."""
    rank = range(len(a))
    return [[scale * sum(b[o][r] * a[r][i] for r in rank) for i in range(len(a[0]))] for o in range(len(b))]


@pytest.mark.parametrize(
    ("write", "scale"),
    [
        (lambda folder, pairs, base: write_kohya(folder, pairs, lambda _: 0.75), 0.75),
        (lambda folder, pairs, base: write_kohya(folder, pairs, None), 1.0),
        (lambda folder, pairs, base: write_kohya(folder, pairs, lambda _: 0.0), 1.0),
        (lambda folder, pairs, base: write_mlx(folder, pairs, 20.0, 4, base), 20.0),
        (lambda folder, pairs, base: write_mlx(folder, pairs, 0.1, 4, base), 0.1),
    ],
    ids=["alpha over rank", "alpha missing", "alpha zero", "MLX 20", "MLX 0.1"],
)
def test_scales_are_what_the_format_means(write, scale, bases, adapters, tmp_path):
    pairs = pairs_of(adapters["chat"])
    folder = peft_folder(str(write(tmp_path / "x", pairs, bases["llama"])), str(bases["llama"]), None)
    base = transformers.LlamaForCausalLM.from_pretrained(bases["llama"])
    model = PeftModel.from_pretrained(base, folder)
    layers = {n.removeprefix(KEY): m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    assert layers.keys() == pairs.keys()
    for module, (a, b) in pairs.items():
        expected = torch.tensor(delta_by_loops(a.double().tolist(), b.double().tolist(), scale))
        assert torch.allclose(layers[module].get_delta_weight("default"), expected, rtol=1e-5, atol=1e-6), module


def test_an_export_of_another_format_is_checked_and_its_source_is_the_users_file(bases, trained, tmp_path):
    from lora_export.artifact import read_manifest, sha256_of
    from lora_export.export.plan import Request
    from lora_export.integrity.sources import SourceOverrides
    from lora_export.pipeline import ExportOptions, check, export

    file = write_kohya(tmp_path / "k", pairs_of(trained["bert"]), lambda module: scale_of("bert", module))
    export(Request(str(bases["bert"]), ((str(file), None),), "dynamic"), ExportOptions(tmp_path / "out"))
    record = read_manifest(tmp_path / "out").adapters[0]
    assert (record.name, record.source.given) == ("mine", str(file))
    assert record.source.files == {"mine.safetensors": sha256_of(file)} and record.scales == (0.5,)
    report, _ = check(tmp_path / "out", SourceOverrides(), CheckOptions(provider="cpu"))
    assert report.verdict == "pass", [case.failures for case in report.cases]
    moved = file.rename(tmp_path / "mine.safetensors")
    with pytest.raises(InputRefused, match="adapter is not where it was"):
        check(tmp_path / "out", SourceOverrides(), CheckOptions(provider="cpu"))
    assert (
        check(tmp_path / "out", SourceOverrides(adapters={"mine": str(moved)}), CheckOptions(provider="cpu"))[0].verdict
        == "pass"
    )
    write_kohya(tmp_path / "other", pairs_of(trained["bert"]), None).rename(moved)
    with pytest.raises(InputRefused, match="adapter is not the one that was exported"):
        check(tmp_path / "out", SourceOverrides(adapters={"mine": str(moved)}), CheckOptions(provider="cpu"))


def test_one_more_adapter_of_another_format_is_added(bases, trained, adapters, tmp_path):
    from lora_export.export.plan import Request
    from lora_export.integrity.sources import SourceOverrides
    from lora_export.pipeline import ExportOptions, add_adapter, export

    out = tmp_path / "out"
    export(Request(str(bases["bert"]), ((str(trained["bert"]), "peft"),), "dynamic"), ExportOptions(out))
    file = write_kohya(tmp_path / "k", pairs_of(trained["bert"]), lambda module: scale_of("bert", module))
    manifest = add_adapter(out, ((str(file), None),), SourceOverrides())
    assert list(manifest.adapter("mine").source.files) == ["mine.safetensors"]
    assert (out / "adapters/mine.onnx_adapter").read_bytes() == (out / "adapters/peft.onnx_adapter").read_bytes()


def test_mlx_records_its_base(bases, adapters, tmp_path):
    from lora_export.export.plan import Request, make_plan

    mlx = write_mlx(tmp_path / "mlx", pairs_of(adapters["chat"]), 2.0, 4, bases["llama"])
    plan = make_plan(Request(None, ((str(mlx), None),), "dynamic"))
    assert plan.checkpoint.path == bases["llama"] and plan.folders[0].name == "mlx"
    kohya = write_kohya(tmp_path / "k", pairs_of(adapters["chat"]), None)
    assert "does not record its base" in refused(kohya, None)


def test_mlx_dora_and_embeddings_become_peft_keys(bases, tmp_path):
    q, embed = "model.layers.0.self_attn.q_proj", "model.embed_tokens"
    generator = torch.Generator().manual_seed(1)
    pairs = {q: tuple(torch.randn(shape, generator=generator) for shape in ((2, 64), (64, 2)))}
    folder = write_mlx(tmp_path / "dora", pairs, 1.5, 2, bases["llama"], fine_tune_type="dora")
    tensors = load_file(folder / "adapters.safetensors") | {f"{q}.m": torch.rand(64) + 1}
    save_file(tensors, folder / "adapters.safetensors")
    base = transformers.LlamaForCausalLM.from_pretrained(bases["llama"])
    weight = base.get_parameter(f"{q}.weight").detach().double()
    merged = PeftModel.from_pretrained(base, peft_folder(str(folder), None, None)).merge_and_unload()
    # mlx-lm tuner/dora.py: adapted = w + (scale · lora_bᵀ) lora_aᵀ, rows rescaled to the norm m.
    delta = delta_by_loops(*(tensor.double().tolist() for tensor in pairs[q]), 1.5)
    adapted = weight + torch.tensor(delta, dtype=torch.float64)
    expected = tensors[f"{q}.m"].double()[:, None] * adapted / adapted.norm(dim=1, keepdim=True)
    assert torch.allclose(merged.get_parameter(f"{q}.weight").double(), expected, atol=1e-5)
    assert (expected - weight).abs().max() > 0.1
    pairs = {embed: tuple(torch.randn(shape, generator=generator) for shape in ((2, 260), (64, 2)))}
    converted = peft_folder(str(write_mlx(tmp_path / "words", pairs, 3.0, 2, bases["llama"])), None, None)
    base = transformers.LlamaForCausalLM.from_pretrained(bases["llama"])
    layer = PeftModel.from_pretrained(base, converted).get_submodule(f"{KEY}{embed}")
    a, b = (tensor.double().tolist() for tensor in pairs[embed])
    # MLX: embedding(i) + scale · lora_a[i] lora_b, with lora_a [rows, rank]; here transposed to [rank, rows].
    expected = torch.tensor(delta_by_loops(a, b, 3.0)).T
    assert torch.allclose(layer.get_delta_weight("default"), expected, rtol=1e-5, atol=1e-5)


def refused(adapter: Path, base: Path | None, task: str | None = None) -> str:
    with pytest.raises(InputRefused) as caught:
        peft_folder(str(adapter), None if base is None else str(base), task)
    return str(caught.value)


def changed(file: Path, change) -> Path:
    tensors = {change(name): tensor for name, tensor in load_file(file).items()}
    save_file({name: tensor for name, tensor in tensors.items() if name is not None}, file)
    return file


def test_names_that_fit_nothing_or_too_much_are_refused(bases, trained, tmp_path):
    base, pairs = bases["llama"], pairs_of(trained["llama"])

    def kohya(folder, **options):
        return write_kohya(tmp_path / folder, pairs, None, **options)

    message = refused(changed(kohya("a"), lambda n: n.replace("layers_1_", "layers_7_")), base)
    assert "2 of 4 names fit no Linear, Conv1D or Embedding module" in message and "layers_7_mlp_down_proj" in message
    assert "rename the keys" in message
    mixed = changed(kohya("b"), lambda n: n.replace("lora_te_", "lora_unet_") if "layers_1" in n else n)
    assert "lora_te (2 modules), lora_unet (2 modules)" in refused(mixed, base)
    both = load_file(kohya("c")) | {
        name.replace("lora_te_", "lora_unet_").replace("model_layers", "down_blocks"): tensor.clone()
        for name, tensor in load_file(tmp_path / "c/mine.safetensors").items()
    }
    save_file(both, tmp_path / "c/mine.safetensors")
    message = refused(tmp_path / "c/mine.safetensors", base)
    assert "adapters of several models" in message and "lora_te (4 modules), lora_unet (4 modules)" in message
    twice = load_file(kohya("d"))
    name = "lora_te_model_layers_0_mlp_down_proj"
    twice |= {key.replace("lora_te_", ""): t.clone() for key, t in twice.items() if key.startswith(name)}
    save_file(twice, tmp_path / "d/mine.safetensors")
    assert "Two names of the file fit the same module" in refused(tmp_path / "d/mine.safetensors", base)
    message = refused(kohya("e"), bases["bert"])
    assert "4 of 4 names fit no" in message


def test_an_underscored_name_that_is_two_paths_is_refused():
    from lora_export.adapters.module_names import Place, resolve_all

    places = {path: Place(path, "Linear", 4, 4) for path in ("a.b_c", "a_b.c", "model.up", "up.model.up")}
    with pytest.raises(InputRefused, match="fits several modules") as caught:
        resolve_all(["lora_a_b_c"], places, "model", where="file", underscored=True)
    assert "a.b_c, a_b.c" in str(caught.value)
    found = resolve_all(["a.b_c", "up"], places, "model", where="file", underscored=False)
    assert [place.path for place in found.values()] == ["a.b_c", "model.up"]


def test_what_is_no_plain_pair_is_refused(bases, trained, tmp_path):
    base, pairs = bases["llama"], pairs_of(trained["llama"])

    def kohya(folder):
        return write_kohya(tmp_path / folder, pairs, None)

    name = "lora_te_model_layers_0_mlp_down_proj"
    file = kohya("dora")
    save_file(load_file(file) | {f"{name}.dora_scale": torch.ones(64, 1)}, file)
    message = refused(file, base)
    assert "no plain LoRA" in message and f"{name}.dora_scale" in message and "lora-export extract" in message
    message = refused(changed(kohya("half"), lambda n: None if n == f"{name}.lora_up.weight" else n), base)
    assert "lacks one half of a pair" in message and f"{name}: a" in message
    file = kohya("shape")
    save_file(load_file(file) | {f"{name}.lora_down.weight": torch.ones(2, 96, 1, 1)}, file)
    message = refused(file, base)
    assert "does not fit the base's module" in message and "[2, 96, 1, 1]" in message
    file = kohya("alpha")
    save_file(load_file(file) | {f"{name}.alpha": torch.tensor(float("nan"))}, file)
    assert "An alpha is no finite number" in refused(file, base)
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    assert "no LoRA adapter of a known format" in refused(tmp_path / "other.safetensors", base)
    for ending, words in (
        ("gguf", "GGUF adapters are not read"),
        ("bin", "pickled"),
        ("txt", "The file is no adapter"),
    ):
        (tmp_path / f"mine.{ending}").write_bytes(b"x")
        assert words in refused(tmp_path / f"mine.{ending}", base)
    (tmp_path / "gguf").mkdir()
    (tmp_path / "mine.gguf").rename(tmp_path / "gguf/mine.gguf")
    assert "GGUF adapters are not read" in refused(tmp_path / "gguf", base)
    folder = kohya("several").parent
    (folder / "second.safetensors").write_bytes((folder / "mine.safetensors").read_bytes())
    assert "several files that may be the adapter" in refused(folder, base)


def test_mlx_settings_that_do_not_fit_are_refused(bases, adapters, tmp_path):
    pairs = pairs_of(adapters["chat"])

    def mlx(folder, scale=2.0, rank=4, **settings):
        return write_mlx(tmp_path / folder, pairs, scale, rank, bases["llama"], **settings)

    assert "one is missing or another than the tensors'" in refused(mlx("a", lora_parameters={"rank": 4}), None)
    assert "one is missing or another than the tensors'" in refused(mlx("b", rank=8), None)
    assert "MLX trained all weights here" in refused(mlx("c", fine_tune_type="full"), None)
    message = refused(mlx("d", fine_tune_type="dora"), None)
    assert "fine_tune_type does not fit" in message and "0 of 4 modules" in message


def test_a_peft_folder_is_left_as_it_is(adapters):
    assert peft_folder(str(adapters["chat"]), None, None) == adapters["chat"]


def test_inspect_names_the_format(bases, adapters, tmp_path):
    from lora_export.cli.text import inspect_text
    from lora_export.export.describe import inspect_path

    pairs = pairs_of(adapters["chat"])
    kohya = inspect_path(str(write_kohya(tmp_path / "k", pairs, None)))
    assert (kohya["format"], kohya["ranks"], len(kohya["modules"])) == ("kohya", [4], 4)
    assert "in the format kohya, not PEFT's" in inspect_text(kohya) and "4 modules of rank 4" in inspect_text(kohya)
    mlx = inspect_path(str(write_mlx(tmp_path / "mlx", pairs, 2.0, 4, bases["llama"])))
    assert (mlx["format"], mlx["ranks"], mlx["base"]) == ("MLX", [4], str(bases["llama"]))
