"""What the GPU stages run: real small models for parity, random weights at real shapes for latency.

Random models are named by shape; their weights decide nothing but that no number overflows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from random_models import LlamaShape, write_adapter, write_llama

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Gpt2Shape:
    """Sizes of a GPT-2."""

    layers: int
    hidden: int
    heads: int
    vocab: int = 50257

    def linears(self, names: tuple[str, ...]) -> dict[str, tuple[int, int]]:
        """`(out_features, in_features)` of the named linear modules of every layer, by path."""
        sizes = {
            "attn.c_attn": (3 * self.hidden, self.hidden),
            "attn.c_proj": (self.hidden, self.hidden),
            "mlp.c_fc": (4 * self.hidden, self.hidden),
            "mlp.c_proj": (self.hidden, 4 * self.hidden),
        }
        return {f"transformer.h.{i}.{name}": sizes[name] for i in range(self.layers) for name in names}


# The LoRA paper's table 1 adapts queries and values, which GPT-2 holds in one module with the keys.
ATTENTION = ("attn.c_attn",)
ALL_LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
GPT2_MEDIUM = Gpt2Shape(24, 1024, 16)
GPT2_SMALL = Gpt2Shape(2, 64, 4, vocab=512)
# Llama 3.2 1B.
LLAMA = LlamaShape(16, 2048, 8192, heads=32, kv_heads=8, head_dim=64, vocab=128256, dtype="float16")
LLAMA_SMALL = LlamaShape(2, 64, 128, heads=4, kv_heads=2, head_dim=16, vocab=512, dtype="float16")


@dataclass(frozen=True)
class Job:
    """One export: folder's name in the bundle, base, adapters, "merge" or "dynamic", dtype.

    Attributes:
        real: The weights mean something and are kept; else they are drawn again on the GPU's machine.
        int4: The base's linear maps are stored as int4 in blocks of 32.
    """

    name: str
    base: Path
    adapters: tuple[Path, ...]
    mode: str
    dtype: str
    task: str | None = None
    real: bool = False
    int4: bool = False


def write_gpt2(folder: Path, shape: Gpt2Shape) -> Path:
    """A GPT-2 of `shape` in `folder` (left as it is if it is there), in float32."""
    from transformers import GPT2Config, GPT2LMHeadModel

    if not (folder / "model.safetensors").exists():
        config = GPT2Config(
            n_layer=shape.layers, n_embd=shape.hidden, n_head=shape.heads, vocab_size=shape.vocab, n_positions=1024
        )
        GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def table1_jobs(work: Path, shape: Gpt2Shape) -> list[Job]:
    """The LoRA paper's table 1: a GPT-2's base, merged and dynamic graphs."""
    base = write_gpt2(work / "gpt2", shape)
    adapters = {}
    for name, modules in (("attention", ATTENTION), ("all", ALL_LINEARS)):
        linears = shape.linears(modules)
        adapters[name] = write_adapter(
            work / f"gpt2-{name}", linears, rank=8, base=base, task_type="CAUSAL_LM", seed=1, fan_in_fan_out=True
        )
    jobs = []
    for dtype in ("float32", "float16"):
        jobs += [
            Job(f"gpt2-base-{dtype}", base, (), "merge", dtype),
            Job(f"gpt2-merged-{dtype}", base, (adapters["attention"],), "merge", dtype),
            Job(f"gpt2-attention-{dtype}", base, (adapters["attention"],), "dynamic", dtype),
            Job(f"gpt2-all-{dtype}", base, (adapters["all"],), "dynamic", dtype),
        ]
    return jobs


def decode_jobs(work: Path, shape: LlamaShape) -> list[Job]:
    """A Llama's base, merged and dynamic graphs, all linears, r = 16."""
    base = write_llama(work / "llama", shape)
    adapter = write_adapter(
        work / "llama-all", shape.linears(), rank=16, base=base, task_type="CAUSAL_LM", seed=1, fan_in_fan_out=False
    )
    return [
        Job("llama-base-float16", base, (), "merge", "float16"),
        Job("llama-merged-float16", base, (adapter,), "merge", "float16"),
        Job("llama-all-float16", base, (adapter,), "dynamic", "float16"),
        Job("llama-base-int4", base, (), "merge", "float16", int4=True),
        Job("llama-all-int4", base, (adapter,), "dynamic", "float16", int4=True),
    ]


def parity_jobs(demo: Path) -> list[Job]:
    """The demo's text classifiers and decoder: merged, and dynamic with all adapters, in every dtype."""
    topics = tuple(demo / "adapters" / name for name in ("topic", "kind", "language"))
    styles = tuple(sorted(path for path in (demo / "decoder-adapters").iterdir() if path.is_dir()))
    jobs = []
    for dtype in DTYPES:
        jobs += [
            Job(f"minilm-merged-{dtype}", demo / "minilm", topics[:1], "merge", dtype, real=True),
            Job(f"minilm-dynamic-{dtype}", demo / "minilm", topics, "dynamic", dtype, real=True),
            Job(f"decoder-merged-{dtype}", demo / "tiny-llama", styles[:1], "merge", dtype, real=True),
            Job(f"decoder-dynamic-{dtype}", demo / "tiny-llama", styles, "dynamic", dtype, real=True),
        ]
    return jobs


def encoder_jobs(work: Path, minilm: Path) -> list[Job]:
    """MiniLM as an encoder, to time beside ONNX Runtime's optimizer: the base, and dynamic on all linears."""
    config = json.loads((minilm / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    sizes = {f"attention.self.{name}": (hidden, hidden) for name in ("query", "key", "value")}
    sizes |= {"attention.output.dense": (hidden, hidden), "intermediate.dense": (inner, hidden)}
    sizes["output.dense"] = (hidden, inner)
    layers = range(config["num_hidden_layers"])
    linears = {f"encoder.layer.{layer}.{name}": size for layer in layers for name, size in sizes.items()}
    linears["pooler.dense"] = (hidden, hidden)
    adapter = write_adapter(work / "minilm-all", linears, rank=8, base=minilm, task_type="FEATURE_EXTRACTION", seed=1)
    jobs = []
    for dtype in ("float32", "float16"):
        jobs.append(Job(f"encoder-base-{dtype}", minilm, (), "merge", dtype, "feature-extraction"))
        jobs.append(Job(f"encoder-dynamic-{dtype}", minilm, (adapter,), "dynamic", dtype, "feature-extraction"))
    return jobs


def export_job(job: Job, out: Path) -> None:
    """Export `job` for CUDA into `out`."""
    from lora_export.export.plan import Request
    from lora_export.pipeline import ExportOptions, export
    from lora_export.quantization import Quantization

    named: tuple[tuple[str, str | None], ...] = tuple((str(path), None) for path in job.adapters)
    how = Quantization() if job.int4 else None
    request = Request(str(job.base), named, job.mode, job.task, job.dtype, "cuda", quantization=how)
    export(request, ExportOptions(out, overwrite=True, zeros_for_missing_head=not job.adapters))
