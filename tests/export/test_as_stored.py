"""`--quantize as-stored`: the integers of a quantized base are in the graph as they are, and proven to be."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import damage
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from quantized_bases import compressed, quantized_base
from safetensors.torch import load_file, save_file

from lora_export.artifact import read_manifest
from lora_export.base.checkpoint import Checkpoint, Located
from lora_export.base.groups import Groups
from lora_export.base.recipe import Part, Quantized
from lora_export.check.context import CheckOptions
from lora_export.check.judge.tolerances import tolerances
from lora_export.check.judge.weights import limits_of_integers
from lora_export.cli.main import main
from lora_export.errors import InputRefused, UsageProblem
from lora_export.export.as_stored import as_stored, grid_of
from lora_export.export.describe import describe_plan
from lora_export.export.integers import dequantized
from lora_export.export.plan import Request, make_plan
from lora_export.graph.stored_integers import stored_integers
from lora_export.integrity.sources import SourceOverrides
from lora_export.pipeline import ExportOptions, add_adapter, check, export
from lora_export.quantization import Grid, Method, Quantization
from lora_export.verdict import Verdict

DOWN = "model.layers.1.mlp.down_proj.weight"
OWN = Quantization(method=Method.AS_STORED)


def groups_of(n_groups: int, *, zeros: bool = True, bits: int = 4, dtype: torch.dtype = torch.float16) -> Groups:
    generator = torch.Generator().manual_seed(n_groups)
    scales = (torch.rand(6, n_groups, generator=generator) + 0.1).to(dtype)
    return Groups(bits, scales, torch.randint(0, 2**bits, (6, n_groups), generator=generator) if zeros else None)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("n_in", "n_groups", "block_size"),
    [(64, 2, 32), (96, 3, 32), (256, 1, 256), (192, 1, 64), (72, 1, 32), (384, 2, 64), (80, 3, 32), (72, 3, None)],
)
@pytest.mark.parametrize("zeros", [True, False])
def test_no_number_changes_whatever_the_groups(bits, n_in, n_groups, block_size, zeros):
    groups = groups_of(n_groups, zeros=zeros, bits=bits)
    if n_in == 80:  # two groups of 32 and one of 16: a short last block
        groups, block_size = replace(groups, of_column=torch.arange(80) // 32), 32
    grid = grid_of(groups, n_in, "float32")
    if block_size is None:
        assert grid == "its groups of 24 columns are no blocks of MatMulNBits"
        return
    assert grid == Grid(bits, block_size, not zeros)
    how = Quantized(Part.INTEGERS, "float32", bits, block_size, not zeros, Method.AS_STORED)
    integers = torch.randint(0, 2**bits, (6, n_in), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = dequantized(as_stored(groups, integers, how), how, n_in).T
    assert n_in != 80 or grid_of(replace(groups, of_column=None, columns=32), 80, "float32") == grid
    expected = replace(groups, scales=groups.scales.float()).values(integers)
    np.testing.assert_array_equal(found, expected.numpy())


def test_what_would_change_a_number_is_named():
    scattered = replace(groups_of(2), of_column=torch.arange(64) % 2)
    assert "do not lie together" in grid_of(scattered, 64, "float32")
    assert isinstance(grid_of(replace(scattered, of_column=torch.arange(64) // 32), 64, "float32"), Grid)
    fine = groups_of(2, dtype=torch.float32)
    assert grid_of(fine, 64, "float16") == "float16 does not have its float32 scales exactly"
    assert grid_of(replace(fine, scales=fine.scales.half().float()), 64, "float16").block_size == 32
    middle = replace(groups_of(2), zeros=torch.full((6, 2), 8))
    assert grid_of(middle, 64, "float16").symmetric


@pytest.fixture(scope="module")
def base_of(bases, tmp_path_factory):
    return lambda method: quantized_base(bases["llama"], method, tmp_path_factory.mktemp(method) / "base")


def exported(base: Path, adapter: Path, out: Path, **how: object) -> Path:
    request = Request(str(base), ((str(adapter), "chat"),), "dynamic", dtype="float32", quantization=OWN, **how)
    export(request, ExportOptions(out))
    return out


def checked(folder: Path):
    return check(folder, SourceOverrides(), CheckOptions(provider="cpu", n_rows=8))[0]


@pytest.mark.parametrize(
    ("method", "bits", "symmetric"), [("gptq", 4, False), ("awq", 4, False), ("compressed", 8, True)]
)
def test_a_bases_own_integers_are_in_the_graph_and_check_proves_it(
    method, bits, symmetric, base_of, adapters, tmp_path
):
    base = base_of(method)
    out = exported(base, adapters["chat"], tmp_path / "out")
    how = read_manifest(out).quantization
    assert (how.method, how.bits, how.symmetric) == (Method.AS_STORED, bits, symmetric)
    assert how.quantizer.lower().startswith({"compressed": "compressed-tensors"}.get(method, method))
    assert len(how.weights) == 14 and "lm_head.weight" not in how.weights
    files, seen = Checkpoint.open(Located(base, "base")).files, 0
    for packed in stored_integers(out / "model.onnx"):
        sizes = [files.tensors[path].shape[0] for path in packed.parameters]
        for stored in packed.apart(sizes):
            (path,) = stored.parameters
            np.testing.assert_array_equal(stored.integers, files.integers(path).numpy())
            assert torch.equal(torch.from_numpy(stored.values).to(files.read(path).dtype), files.read(path))
            seen += 1
    assert seen == 14
    report = checked(out)
    assert report.verdict is Verdict.PASS, [(c.group, c.name, c.failures) for c in report.cases if c.failures]
    (weights,) = [case for case in report.cases if case.group == "weights"]
    assert [each.name for each in weights.measures] == ["weights"] and weights.value("weights") == 0


def test_one_scale_or_one_number_that_is_not_the_bases_fails_and_what_is_added_is_right(base_of, adapters, tmp_path):
    base = base_of("gptq")
    out = exported(base, adapters["gains"], tmp_path / "out")
    add_adapter(out, ((str(adapters["gains"]), "again"),), SourceOverrides())
    assert checked(out).verdict is Verdict.PASS
    for part, change in (("_scales", _slightly_more), ("_Q4", _off_by_one)):
        folder = shutil.copytree(out, tmp_path / part)
        damage.stored(folder, f"{DOWN}{part}", change)
        failed = [(case.group, each) for case in checked(folder).cases for each in case.failures]
        assert any(group == "weights" and DOWN in each for group, each in failed)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_limit_of_a_bases_own_integers_is_that_of_float32(dtype):
    for_floats = tolerances("float32", "cpu", quantized=True).weights
    limits = tolerances(dtype, "cpu", quantized=True)
    assert limits_of_integers(limits, Method.RTN, ()) == limits and limits.weights > 100 * for_floats
    own = limits_of_integers(limits, Method.AS_STORED, ())
    assert own.weights == for_floats and own.scales == limits.scales
    assert next(each for each in own.recorded if each.measure == "weights").limit == for_floats
    assert limits_of_integers(limits, Method.AS_STORED, ("weights",)) == limits


def test_scales_that_are_not_finite_and_a_shape_that_fits_no_groups_are_refused(base_of, adapters, tmp_path):
    base = Path(shutil.copytree(base_of("compressed"), tmp_path / "base"))
    stored = load_file(base / "model.safetensors")
    request = Request(str(base), ((str(adapters["chat"]), "chat"),), "dynamic", dtype="float32", quantization=OWN)
    name = "model.layers.0.mlp.up_proj.weight_scale"
    for scale, message in (
        (torch.full_like(stored[name], torch.inf), "A weight is not finite"), (stored[name][:1, 0], "not stored as its"),
    ):  # fmt: skip
        save_file(stored | {name: scale}, base / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputRefused, match=message):
            describe_plan(request, tmp_path / "out")


def test_projections_of_other_bits_stay_apart_on_cuda_and_none_falls_to_floats(base_of, bases, adapters, tmp_path):
    base = Path(shutil.copytree(base_of("compressed"), tmp_path / "base"))
    stored, floats = load_file(base / "model.safetensors"), load_file(bases["llama"] / "model.safetensors")
    for layer in range(2):
        module = f"model.layers.{layer}.self_attn.k_proj"
        parts = compressed(floats[f"{module}.weight"].numpy(), bits=4)
        stored |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    out = exported(base, adapters["chat"], tmp_path / "out", provider="cuda")
    found = {path: packed.bits for packed in stored_integers(out / "model.onnx") for path in packed.parameters}
    assert len(found) == 14 and {path for path, bits in found.items() if bits == 4} == {
        f"model.layers.{layer}.self_attn.k_proj.weight" for layer in range(2)
    }


def _slightly_more(scales: np.ndarray) -> np.ndarray:
    changed = scales.copy()
    changed.flat[5] *= 1.002
    return changed


def _off_by_one(integers: np.ndarray) -> np.ndarray:
    changed = integers.copy()
    changed.flat[5] ^= 1
    return changed


def test_what_cannot_be_taken_is_refused_before_any_work(base_of, bases, adapters, tmp_path):
    def described(base: Path, dtype: str = "float32", **how: object) -> dict:
        adapter = ((str(adapters["chat"]), "chat"),)
        return describe_plan(
            Request(str(base), adapter, "dynamic", dtype=dtype, quantization=OWN, **how), tmp_path / "o"
        )

    with pytest.raises(InputRefused, match="None of the base's weights can be taken as it is stored") as refused:
        described(base_of("gptq-scattered"))
    assert "desc_act" in refused.value.found and "--quantize int4" in refused.value.next_step
    with pytest.raises(InputRefused, match="None of") as refused:
        described(bases["llama"])
    assert refused.value.found.startswith("floats: ")
    with pytest.raises(InputRefused, match="None of") as refused:
        described(base_of("compressed-f32"), "float16")
    assert "add --dtype float32" in refused.value.next_step
    with pytest.raises(UsageProblem, match="cannot be folded into the base's own integers") as refused:
        make_plan(Request(str(base_of("awq")), ((str(adapters["chat"]), "chat"),), "merge", quantization=OWN))
    assert "use dynamic" in refused.value.next_step
    plan = described(base_of("awq"))
    assert plan["quantization"] == "the base's own integers (accuracy level 4)"


def test_options_that_choose_integers_do_not_go_with_it(tmp_path):
    asked = ["merge", str(tmp_path), "--provider", "cpu", "-o", "out", "--quantize", "as-stored"]
    done = CliRunner().invoke(main, [*asked, "--block-size", "64"])
    assert done.exit_code == 2 and "--block-size chooses nothing" in done.output + (done.stderr or "")
