"""Benchmark: the quantizers of `--quantize int4` beside each other, on SmolLM2-135M with a trained adapter.

    python ci/benchmarks/quantizers.py --work /tmp/quantizers --samples FOLDER

FOLDER is what `samples/smollm2.py --out FOLDER` wrote: the base, converted to float32 from GGUF, and its adapters. Each
quantizer, in blocks of 32 and of 128: what it costs against the base's floats, as `check` measures it, on 64 docstrings
of held-out files and, with the adapter, on 64 of its held-out examples; the time and memory of an export whose graph is
kept; and a decoding step of one row on a past of 256 tokens with the adapter, over that of the float32 export, in
paired blocks of one race.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from gpu.peers import decoder_run
from gpu.timing import Device, adapter_arrays, race, ratio_lines
from processes import run_measured
from readme_tables import write_into_readme
from results import RESULTS, heading, host_kind, provenance, table, write_json

from lora_export.artifact import read_manifest
from lora_export.check.cases.quantized import cost_cases, weight_cases
from lora_export.check.context import CheckOptions
from lora_export.check.opened import opened_check
from lora_export.integrity.sources import SourceOverrides
from lora_export.quantization import Method, Quantization
from lora_export.runtime.session import open_session

_ADAPTER, _RANK, _ROWS, _SHAPE = "declare", 16, 64, (1, 1, 256)
_QUANTIZERS = {
    "rtn": Quantization(),
    "rtn, asymmetric": Quantization(symmetric=False),
    "k_quant": Quantization(method=Method.K_QUANT),
    "hqq": Quantization(method=Method.HQQ),
}
_BLOCK_SIZES = (32, 128)
RECIPES = {
    f"{name}, blocks of {size}": replace(how, block_size=size)
    for size in _BLOCK_SIZES
    for name, how in _QUANTIZERS.items()
}
_FLOATS = "float32"
_COSTS = ("cost_kl", "cost_top1", "cost_perplexity", "cost_effect")


def write_texts(folder: Path, samples: Path) -> dict[str | None, Path]:
    """Real text that no adapter saw: docstrings for the base, the adapter's own held-out examples for it."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "samples"))
    import corpus
    import smollm2

    paths = corpus.files(corpus.STDLIB, "*.py", "[a-z]*/*.py")
    passages = [each.text for each in corpus.docstrings(paths) if corpus.is_heldout(each.source)]
    _, heldout = smollm2.functions()
    examples = smollm2.examples(_ADAPTER, heldout)
    texts = {None: passages, _ADAPTER: [each.prompt + each.answer for each in examples]}
    found = {}
    for name, rows in texts.items():
        found[name] = folder / f"{name or 'base'}.jsonl"
        chosen = rows[:: len(rows) // _ROWS][:_ROWS]
        found[name].write_text("".join(json.dumps({"text": row}) + "\n" for row in chosen), encoding="utf-8")
    return found


def options_of(how: Quantization | None) -> list[str]:
    """The command line's options that ask for `how`."""
    if how is None:
        return []
    options = ["--quantize", how.name, "--block-size", str(how.block_size), "--quantize-method", how.method]
    return options if how.symmetric or how.method is not Method.RTN else [*options, "--asymmetric"]


def exported(base: Path, adapter: Path, out: Path, how: Quantization | None) -> dict:
    """Make one export; seconds and peak anonymous bytes."""
    command = [str(Path(sys.executable).with_name("lora-export")), "dynamic", str(base), str(adapter), "-o", str(out)]
    command += ["--overwrite", "--provider", "cpu", *options_of(how)]
    environment = os.environ | {"LORA_EXPORT_CACHE": str(out.parent / "cache"), "HF_HUB_OFFLINE": "1"}
    usage = run_measured(command, environment)
    print(out.name, f"{usage.seconds:.1f} s, {usage.peak_bytes / 1e9:.2f} GB", flush=True)
    return {"seconds": usage.seconds, "peak_bytes": usage.peak_bytes}


def cost_of(folder: Path, data: Mapping[str | None, Path]) -> dict:
    """What `check` measures of the base and of the adapter on it, and whether the weights are the quantizer's."""
    options = CheckOptions(provider="cpu", data=data, n_rows=_ROWS)
    examination = opened_check(folder, SourceOverrides(), options).examination
    cost_cases(examination)
    weight_cases(examination)
    *costs, weights = examination.cases
    print(*(f"  {case.name}: KL {case.value('cost_kl'):.4f}" for case in costs), sep="\n", flush=True)
    of_adapter, of_base = ({each.name: each.value for each in case.measures if each.name in _COSTS} for case in costs)
    return {"adapter": of_adapter, "base": of_base, "rows": costs[0].n_rows, "weights_failures": list(weights.failures)}


def decode(folders: Mapping[str, Path], blocks: int) -> dict:
    """Latencies of one decoding step with the adapter, as ratios to that of the floats."""
    manifest = read_manifest(folders[_FLOATS])
    vocabulary = next(spec.dims[-1] for spec in manifest.contract.outputs if spec.name == "logits")
    cache = next(spec for spec in manifest.contract.inputs if spec.name.startswith("past_key_values"))
    size = {"head_size": cache.dims[-1], "slots": _SHAPE[1] + _SHAPE[2]}
    arrays, device = adapter_arrays(manifest.contract, 1, _RANK), Device("cpu")
    sessions = {name: open_session(path / "model.onnx", "cpu", stop_spinning=True) for name, path in folders.items()}
    runs = {
        name: decoder_run(session, device, _SHAPE, vocabulary, adapters=arrays, **size)
        for name, session in sessions.items()
    }
    result = race(runs, [(name, _FLOATS) for name in folders if name != _FLOATS], blocks)
    print(*ratio_lines(result), sep="\n", flush=True)
    return result


def report(result: Mapping) -> str:
    """The table of the docs."""
    ratios = {each["variant"]: each for each in result["decode"]["ratios"]}
    rows = []
    for name, found in result["found"].items():
        base, adapter = found["base"], found["adapter"]
        ratio = ratios[name]
        rows.append(
            (
                name,
                f"{base['cost_kl']:.4f}",
                f"{base['cost_top1']:.1%}",
                f"{base['cost_perplexity']:+.1%}",
                f"{adapter['cost_kl']:.4f}",
                f"{adapter['cost_top1']:.1%}",
                f"{adapter['cost_perplexity']:+.1%}",
                f"{adapter['cost_effect']:.1%}",
                f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
                f"{found['export']['seconds']:.0f} s, {found['export']['peak_bytes'] / 1e9:.2f} GB",
                f"{found['bytes'] / 1e6:.0f} MB",
            )
        )
    columns = (
        "quantizer", "KL, base", "top-1", "perplexity", "KL, with the adapter", "top-1", "perplexity", "effect kept",
        "decoding ÷ float32", "export", "weights",
    )  # fmt: skip
    where = table(("part", "measured on"), [("all", heading(result["environment"]))])
    return f"{where}\n\n{table(columns, rows)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="for exports")
    parser.add_argument("--samples", type=Path, required=True, help="what samples/smollm2.py wrote")
    parser.add_argument("--blocks", type=int, default=12)
    arguments = parser.parse_args()
    work, samples = arguments.work, arguments.samples
    work.mkdir(parents=True, exist_ok=True)
    environment = provenance()
    data = write_texts(work, samples)
    base, adapter = samples / "smollm2", samples / "smollm2-adapters" / _ADAPTER
    folders = {_FLOATS: work / _FLOATS} | {name: work / name.replace(", ", "-").replace(" ", "-") for name in RECIPES}
    exported(base, adapter, folders[_FLOATS], None)
    found = {}
    for name, how in RECIPES.items():
        usage = exported(base, adapter, folders[name], how)
        n_bytes = read_manifest(folders[name]).weights_bytes(folders[name])
        found[name] = {"export": usage, "bytes": n_bytes} | cost_of(folders[name], data)
    result = {"environment": environment, "found": found, "decode": decode(folders, arguments.blocks)}
    write_json(RESULTS / f"quantizers-{host_kind()}.json", result)
    write_into_readme("quantizers", report(result))
    print(report(result))


if __name__ == "__main__":
    main()
