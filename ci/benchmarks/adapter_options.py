"""What an adapter can be: one row an option, the columns of `matrix.py`. To cover another option, append a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import peft
from architectures import IMAGES, Architecture

MERGED, SERVED, REFUSED = "merged", "served", "refused"


@dataclass(frozen=True)
class AdapterOption:
    """An option, and what must come of it.

    Attributes:
        config: The PEFT config of an architecture's adapter of some rank; None where the architecture has none.
        merge: What `merge` must do: MERGED or REFUSED.
        dynamic: What `dynamic` must do: SERVED or REFUSED.
        named: What a refusal must name: the option's key in `adapter_config.json`.
        exceptions: (merge, dynamic) of single architectures, by name.
        only: The architectures it is run on, by name; empty for all.
        dtype: `--dtype`.
    """

    name: str
    config: Callable[[Architecture, int], peft.PeftConfig | None]
    merge: str = MERGED
    dynamic: str = SERVED
    named: str = ""
    exceptions: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    dtype: str | None = None

    def expected(self, architecture: str, mode: str) -> str:
        merge, dynamic = self.exceptions.get(architecture, (self.merge, self.dynamic))
        return merge if mode == "merge" else dynamic


def lora(architecture: Architecture, rank: int, **changes: object) -> peft.LoraConfig:
    """LoRA on the architecture's usual targets, with `changes`."""
    fields = {"r": rank, "target_modules": architecture.targets, "task_type": architecture.task_type}
    return peft.LoraConfig(**(fields | changes))


def with_options(**changes: object) -> Callable[[Architecture, int], peft.LoraConfig]:
    return lambda architecture, rank: lora(architecture, rank, **changes)


def packed(architecture: Architecture, rank: int) -> peft.LoraConfig | None:
    return lora(architecture, rank, target_modules=list(architecture.packed)) if architecture.packed else None


def all_linear(architecture: Architecture, rank: int) -> peft.LoraConfig:
    """Every linear map but a classifier's, which PEFT saves whole for a classification."""
    heads = ".*(classifier|score)" if (architecture.task_type or "").endswith("CLS") else None
    return lora(architecture, rank, target_modules="all-linear", exclude_modules=heads)


def patterns(architecture: Architecture, rank: int) -> peft.LoraConfig:
    """Another rank in the first layer, another scale in the second."""
    return lora(architecture, rank, rank_pattern={r".*\.0\..*": rank + 2}, alpha_pattern={r".*\.1\..*": 5})


def whole_head(architecture: Architecture, rank: int) -> peft.LoraConfig | None:
    return lora(architecture, rank, modules_to_save=[architecture.head]) if architecture.head else None


def tokens(architecture: Architecture, rank: int, chosen: Sequence[int] = (5, 9, 30)) -> peft.LoraConfig | None:
    """Rows of the embedding, which PEFT finds by itself but in CLIP."""
    indices = list(chosen)
    found = {"token_embedding": indices} if architecture.config.startswith("CLIP") else indices
    return None if architecture.config in IMAGES else lora(architecture, rank, trainable_token_indices=found)


def pissa(architecture: Architecture, rank: int) -> peft.LoraConfig | None:
    """Not for mixtures: a start that changes the base's last bits sends tokens to other experts, in PEFT as well."""
    return None if "Moe" in architecture.config else lora(architecture, rank, init_lora_weights="pissa")


SEQ2SEQ_CONFIGS = ("T5Config", "BartConfig", "WhisperConfig")
TABLES = ["word_embeddings", "embed_tokens", "wte", "embed_in", "tok_embeddings", "token_embedding"]


def experts(architecture: Architecture, rank: int) -> peft.LoraConfig:
    """The packed weights of a mixture's experts."""
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return lora(architecture, rank, target_parameters=names)


def embedding(architecture: Architecture, rank: int) -> peft.LoraConfig | None:
    """The embedding of tokens; PEFT does not find CLIP's, and an encoder-decoder's is shared (see trainable_tokens)."""
    if architecture.config in (*IMAGES, *SEQ2SEQ_CONFIGS, "CLIPConfig"):
        return None
    return lora(architecture, rank, target_modules=TABLES)


def convolution(architecture: Architecture, rank: int) -> peft.LoraConfig:
    """Patch embeddings. Not Whisper's convolutions: its forward asks them for a stride, which PEFT's layers hide."""
    return lora(architecture, rank, target_modules=[*architecture.targets, "projection", "patch_embedding"])


def activated(architecture: Architecture, rank: int) -> peft.LoraConfig | None:
    """Active from the last invocation on; for decoders only. Not where tokens are flattened before an MLP: PEFT
    then cannot tell which are active."""
    if architecture.task_type != "CAUSAL_LM" or architecture.config in ("OPTConfig", "Qwen2MoeConfig"):
        return None
    return lora(architecture, rank, alora_invocation_tokens=[20, 20 + rank])


def multiplied(architecture: Architecture, rank: int) -> peft.IA3Config:
    given = architecture.targets
    targets = ["q_proj", "v_proj", "query_key_value", "qkv_proj"] if isinstance(given, str) else list(given)
    return peft.IA3Config(target_modules=targets, feedforward_modules=[], task_type=architecture.task_type)


def rotated(architecture: Architecture, rank: int) -> peft.OFTConfig | None:
    if architecture.config == "GPT2Config":  # PEFT's OFT does not take Conv1D
        return None
    return peft.OFTConfig(r=0, oft_block_size=8, target_modules=architecture.targets, task_type=architecture.task_type)


# Linear modules without a bias, which a merge cannot give one.
_BARE = ("ModernBERT", "Llama", "Llama, classifier", "Qwen2", "Qwen3", "Mistral", "Gemma 2", "Gemma 3", "Phi-3")
_NO_BIAS = dict.fromkeys((*_BARE, "Mixtral", "Qwen2-MoE", "Qwen3-MoE", "CLIP", "T5", "T5 1.1"), (REFUSED, SERVED))
# Encoder and decoder read one embedding, of which PEFT adapts one use.
_SHARED_TABLE = dict.fromkeys(("T5", "T5 1.1", "BART"), (REFUSED, REFUSED))
# PEFT turns the routers and experts that "all-linear" finds in these into target_parameters.
EXPERTS = ("Mixtral", "Qwen2-MoE", "Qwen3-MoE")
_EXPERTS_MERGED = dict.fromkeys(("Mixtral", "Qwen3-MoE"), (MERGED, REFUSED))
IMAGE_TOWERS = ("ViT", "CLIP", "CLIP, images")
OPTIONS = (
    AdapterOption("lora", lora),
    AdapterOption("all linear", all_linear, named="target_parameters", exceptions=_EXPERTS_MERGED),
    AdapterOption("packed", packed),
    AdapterOption("rslora", with_options(use_rslora=True)),
    AdapterOption("rank_pattern", patterns),
    AdapterOption("modules_to_save", whole_head),
    # Not where a router chooses experts: at a tie of random weights one rounding sends a token to another expert.
    AdapterOption("float16", lora, dtype="float16", only=("BERT", "ModernBERT", "GPT-2", "Llama", "Gemma 3", "ViT")),
    AdapterOption("dora", with_options(use_dora=True)),
    AdapterOption("bias", with_options(bias="lora_only")),
    AdapterOption("lora_bias", with_options(lora_bias=True), named="adds a bias", exceptions=_NO_BIAS),
    AdapterOption("trainable_tokens", tokens, named="shared", exceptions=_SHARED_TABLE),
    AdapterOption("embedding", embedding),
    AdapterOption("pissa", pissa),
    AdapterOption("experts", experts, MERGED, REFUSED, "target_parameters", only=EXPERTS),
    AdapterOption("convolution", convolution, only=IMAGE_TOWERS),
    AdapterOption("alora", activated, REFUSED, SERVED, "alora_invocation_tokens"),
    AdapterOption("IA3", multiplied, MERGED, REFUSED, "IA3"),
    AdapterOption("OFT", rotated, MERGED, REFUSED, "OFT"),
)
