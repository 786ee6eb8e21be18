"""`genai_config.json`: what ONNX Runtime GenAI needs to generate with an exported decoder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_export.artifact import sha256_of
from lora_export.base.tasks import Task
from lora_export.contract import PAST, PRESENT, SINGLE, CacheLayout, GraphContract, graph_file
from lora_export.export.given_files import copy_settings
from lora_export.export.plan import Plan
from lora_export.other_tools import GENAI_CONFIG
from lora_export.runtime.end_tokens import end_tokens_in
from lora_export.runtime.tokenizer import open_tokenizer

# GenAI runs every other decoder with per-layer caches under its generic type.
_GENAI_TYPES = ("gemma", "gemma2", "granite", "llama", "mistral", "olmo", "phi", "phi3", "qwen2", "qwen3", "smollm3")


def write_settings(
    plan: Plan, folder: Path, contracts: Mapping[str, GraphContract], *, required: bool
) -> dict[str, str]:
    """Write what GenAI needs of a decoder into `folder`, of a given graph its own; sha256 by name.

    Args:
        required: The graph's adapter inputs are without defaults, and GenAI feeds none: there is no file then.
    """
    if plan.task is not Task.TEXT_GENERATION or required:
        return {}
    if plan.given_graph is not None and plan.given_graph.settings:
        return copy_settings(plan.given_graph, folder)
    is_brought = "." in plan.carried.places.values()
    ends = end_tokens_in(folder, folder, is_brought=is_brought, tokenizer=lambda: open_tokenizer(folder))
    return _write_genai_config(folder, plan.config, contracts[SINGLE], ends=sorted(ends))


def _write_genai_config(folder: Path, config, contract: GraphContract, *, ends: Sequence[int]) -> dict[str, str]:
    """Write the file for a decoder of `config` (a `PretrainedConfig`) and return its sha256 by name.

    Args:
        ends: The tokens that end a text, by the settings in `folder`.

    Greedy search without sampling, so that a first run is reproducible; hosts override it per request. There is no file
    where the cache differs by layer or keys from values (Gemma 4, DeepSeek): GenAI has one number of heads, one size.
    """
    caches = [spec for spec in contract.inputs if spec.name.startswith(PAST)]
    if len({(spec.dims[1], spec.dims[3]) for spec in caches}) != 1:
        return {}
    config, cache = config.get_text_config(), caches[0]
    own = {"input_ids", "attention_mask", "position_ids"} & {spec.name for spec in contract.inputs}
    names = {name: name for name in sorted(own)}
    context = getattr(config, "max_position_embeddings", None) or 2048
    bos, eos, pad = (getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad"))
    pad = pad if pad is not None else (eos[0] if isinstance(eos, list) else eos)
    if ends and set(ends) != set(eos if isinstance(eos, list) else [eos]):  # else as the configuration has them
        eos = list(ends) if len(ends) > 1 else ends[0]
    fields = {
        "model": {
            "bos_token_id": bos if bos is not None else 0,
            "context_length": context,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "log_severity_level": 3, "provider_options": []},
                "filename": graph_file(SINGLE),
                "head_size": cache.dims[3],
                "hidden_size": config.hidden_size,
                "inputs": names | {"past_key_names": f"{PAST}%d.key", "past_value_names": f"{PAST}%d.value"},
                "outputs": {
                    "logits": "logits",
                    "present_key_names": f"{PRESENT}%d.key",
                    "present_value_names": f"{PRESENT}%d.value",
                },
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": len(caches) // 2,
                "num_key_value_heads": cache.dims[1],
            },
            "eos_token_id": eos if eos is not None else -1,
            "pad_token_id": pad if pad is not None else 0,
            "type": config.model_type if config.model_type in _GENAI_TYPES else "decoder",
            "vocab_size": config.vocab_size,
        },
        "search": {
            "do_sample": False,
            "max_length": context,
            "past_present_share_buffer": contract.cache_layout is CacheLayout.TOKENS,
        },
    }
    path = folder / GENAI_CONFIG
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return {GENAI_CONFIG: sha256_of(path)}
