"""What every stage is given: the bundle, the provider, where results go; and PyTorch where it is installed."""

from __future__ import annotations

import functools
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from results import provenance, write_json

from gpu.models import ALL_LINEARS, ATTENTION, GPT2_MEDIUM, GPT2_SMALL, LLAMA, LLAMA_SMALL

Run = Callable[[], None]


@dataclass
class Stage:
    """One stage as it runs.

    Attributes:
        name: As `ci/gpu --list` names it; its file is `gpu-<name>.json`.
        bundle: What `ci/gpu prepare` made.
        work: Where exports are restored.
        blocks: ABBA blocks of each race.
        small: Rehearse at small shapes.
        torch_device: "cuda", "cpu", or "" where PyTorch, Transformers or PEFT are missing.
    """

    name: str
    bundle: Path
    work: Path
    results: Path
    provider: str
    blocks: int
    small: bool = False
    torch_device: str = ""
    started: float = field(default_factory=time.monotonic)
    head: dict = field(default_factory=dict)

    def save(self, found: Mapping) -> None:
        """Write what was found so far: a stage that is cut short loses nothing."""
        if not self.head:
            environment = provenance(self.provider) | device_facts()
            exported_at = (self.bundle / "commit").read_text() if (self.bundle / "commit").exists() else ""
            self.head = {"stage": self.name, "environment": environment, "bundle_commit": exported_at}
        seconds = {"seconds": round(time.monotonic() - self.started, 1)}
        write_json(self.results / f"gpu-{self.name}.json", self.head | seconds | dict(found))

    def say(self, title: str, lines: Sequence[str], failed: Mapping[str, str] = {}) -> None:
        print(f"[{time.monotonic() - self.started:5.0f} s] {self.name}: {title}")
        for line in [*lines, *(f"  FAILED {name}: {why[:200]}" for name, why in failed.items())]:
            print(line)
        print(end="", flush=True)


def device_facts() -> dict:
    """What the driver says of the GPU; empty where there is none."""
    found = {}
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem", "--format=csv"]
        found["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pass
    return found


def torch_lora_gpt2(stage: Stage, dtype: str, batch: int, sequence: int) -> dict[str, Run]:
    """PyTorch eager: PEFT unmerged and merged, r = 8 on the attention's projection and on all linears."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2_SMALL if stage.small else GPT2_MEDIUM
    config = GPT2Config(n_layer=shape.layers, n_embd=shape.hidden, n_head=shape.heads, vocab_size=shape.vocab)
    build = functools.partial(GPT2LMHeadModel, config)
    runs = {}
    for name, modules in (("attention", ATTENTION), ("all", ALL_LINEARS)):
        runs |= _torch_lora(stage, build, f"PyTorch, {name}", modules, dtype, batch, sequence, 8)
    del runs["PyTorch, all, merged"]  # the same graph and time as the other
    return runs


def torch_lora_llama(stage: Stage, batch: int, sequence: int, past: int) -> dict[str, Run]:
    """PyTorch eager with its own cache: PEFT unmerged and merged on all linears, r = 16."""
    from random_models import llama_config
    from transformers import LlamaForCausalLM

    config = llama_config(LLAMA_SMALL if stage.small else LLAMA)
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    build = functools.partial(LlamaForCausalLM, config)
    return _torch_lora(stage, build, "PyTorch", names, "float16", batch, sequence, 16, past)


_models: dict = {}


def _torch_lora(
    stage: Stage,
    build: Callable,
    name: str,
    modules: Sequence[str],
    dtype: str,
    batch: int,
    sequence: int,
    rank: int,
    past: int = 0,
) -> dict[str, Run]:
    import torch
    from peft import LoraConfig, get_peft_model

    runs = {}
    device = torch.device(stage.torch_device)
    for merged in (False, True):
        key = (name, dtype, merged)
        if key not in _models:
            with torch.device(device):
                model = build().to(getattr(torch, dtype))
                last = [module.rsplit(".", 1)[-1] for module in modules]
                config = LoraConfig(r=rank, lora_alpha=rank, target_modules=last, init_lora_weights=False)
                model = get_peft_model(model, config).eval()
            model = model.to(device=device, dtype=getattr(torch, dtype))
            _models[key] = model.merge_and_unload() if merged else model
        label = f"{name}, {'merged' if merged else 'PEFT'}"
        runs[label] = _torch_run(_models[key], batch, sequence, past)
    return runs


def _torch_run(model, batch: int, sequence: int, past: int) -> Run:
    import torch
    from transformers import DynamicCache

    config, device = model.config, next(model.parameters()).device
    ids = torch.randint(0, 500, (batch, sequence), device=device)
    mask = torch.ones(batch, past + sequence, dtype=torch.long, device=device)
    states = None
    if past:
        size = (batch, config.num_key_value_heads, past, config.head_dim)
        states = [torch.randn(size, device=device, dtype=model.dtype) for _ in range(config.num_hidden_layers)]

    def run() -> None:
        cache = None
        if states is not None:  # a step appends to its cache, so each has a fresh one over the same states
            cache = DynamicCache()
            for layer, state in enumerate(states):
                cache.update(state, state, layer)
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run
