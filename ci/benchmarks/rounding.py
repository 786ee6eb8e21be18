"""How near merged weights are to the float64 truth, ours and those of PEFT's `merge_and_unload`, in half precision.

    python ci/benchmarks/rounding.py --work /tmp/bench      # a minute; writes results/rounding.json

A 4-layer Llama shape, hidden 512, random weights, adapters on all linears. Error of a weight: root of the mean square
over the change that the adapters make, so that 1 would be a change lost. The truth is summed in float64 from the same
stored half-precision base.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import peft
import torch
import transformers

from lora_export.artifact import versions
from lora_export.export.plan import Request, make_plan
from lora_export.export.resolve import resolve
from lora_export.quiet import quiet

RESULTS = Path(__file__).parent / "results" / "rounding.json"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
CASES = {
    "LoRA": [{}],
    "DoRA": [{"use_dora": True}],
    "two adapters": [{}, {"use_rslora": True}],
    "eight adapters": [{}] * 8,
}


def make_base(folder: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = transformers.LlamaConfig(**sizes, vocab_size=2000, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder)


def make_adapter(base: Path, folder: Path, seed: int, options: dict) -> None:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.002)  # a change of a few percent, as training makes
    model.save_pretrained(folder)


def load(base: Path, dtype: torch.dtype) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)


def truth(base: Path, adapters: list[Path]) -> dict[str, torch.Tensor]:
    """`W0 + Σ ΔW` in float64, each adapter merged by PEFT alone into the float64 base."""
    start = {name: tensor.clone() for name, tensor in load(base, torch.float64).state_dict().items()}
    total = {name: tensor.clone() for name, tensor in start.items()}
    for adapter in adapters:
        model = peft.PeftModel.from_pretrained(load(base, torch.float64), adapter, autocast_adapter_dtype=False)
        for name, tensor in model.double().merge_and_unload().state_dict().items():
            total[name] += tensor - start[name]
    return total


def by_peft(base: Path, adapters: list[Path], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = load(base, dtype)
    for adapter in adapters:
        model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model.state_dict()


def measure(base: Path, adapters: list[Path], dtype: str) -> dict[str, float]:
    chosen = tuple((str(path), path.name) for path in adapters)
    source = resolve(make_plan(Request(str(base), chosen, "merge", dtype=dtype))).parameters
    expected, theirs = truth(base, adapters), by_peft(base, adapters, DTYPES[dtype])
    start = load(base, torch.float64).state_dict()
    ours_of, theirs_of = [], []
    for name in (name for name in expected if name.endswith("_proj.weight")):
        change = (expected[name] - start[name]).square().mean().sqrt()
        for found, values in ((source.parameter(name, DTYPES[dtype]), ours_of), (theirs[name], theirs_of)):
            values.append(float((found.double() - expected[name]).square().mean().sqrt() / change))
    pairs = list(zip(ours_of, theirs_of, strict=True))
    return {
        "weights": len(pairs),
        "error_ours": sum(ours_of) / len(pairs),
        "error_peft": sum(theirs_of) / len(pairs),
        "largest_ratio": max(ours / peft_error for ours, peft_error in pairs),
    }


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder for bases and adapters.")
def main(work: Path) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found: dict[str, dict[str, dict[str, float]]] = {}
    for dtype, torch_dtype in DTYPES.items():
        with quiet():
            make_base(work / dtype, torch_dtype)
        for case, options in CASES.items():
            adapters = [work / f"{dtype}-{case.replace(' ', '-')}-{index}" for index in range(len(options))]
            with quiet():
                for index, (adapter, chosen) in enumerate(zip(adapters, options, strict=True)):
                    make_adapter(work / dtype, adapter, index, chosen)
                found.setdefault(case, {})[dtype] = row = measure(work / dtype, adapters, dtype)
            click.echo(
                f"{case:15} {dtype:9} ours {row['error_ours']:.4f}  PEFT {row['error_peft']:.4f}  "
                f"largest ratio of a weight {row['largest_ratio']:.4f}"
            )
    RESULTS.write_text(json.dumps({"versions": versions(), "results": found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
