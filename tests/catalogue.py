"""The tiny bases, adapters and exports that the tests share, by name; each is made once, when it is first asked for."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lora_export.quantization import Method, Quantization


class Lazy(Mapping):
    """Folders by name, made on first use; processes that are given the same `root` share them.

    A folder is read-only once it is made: `refuse_changes` tells a test that wrote into one.
    """

    def __init__(self, root: Path, names: Mapping, make: Callable[[str, Path], None]) -> None:
        self._root, self._names, self._make = root, names, make
        self._made: dict[str, Path] = {}

    def __getitem__(self, name: str) -> Path:
        if name not in self._made:
            folder, record = self._root / name, self._root / f"{name}.made"
            with _locked(self._root / f"{name}.lock"):
                if not record.exists():
                    shutil.rmtree(folder, ignore_errors=True)  # of another process that failed
                    self._make(name, folder)
                    record.write_text(json.dumps(_files_in(folder)), encoding="utf-8")
            self._made[name] = folder
        return self._made[name]

    def __iter__(self):
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def refuse_changes(self) -> None:
        """Raise if a file of a folder that this process used is not as it was made."""
        for name, folder in self._made.items():
            made = json.loads((self._root / f"{name}.made").read_text(encoding="utf-8"))
            assert _files_in(folder) == made, f"a test changed {folder}, which others read: copy it before (`own`)"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _files_in(folder: Path) -> dict[str, list[int]]:
    """Size and time of the last change of every file."""
    found = {path.relative_to(folder).as_posix(): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in sorted(found.items())}


SEQ2SEQ_BASES = ("t5", "flan", "bart", "whisper")
BASES = ("llama", "llama-f16", "gpt2", "bert", "classifier", "tagger", "albert", "vit", "clip", *SEQ2SEQ_BASES)


def make_base(name: str, folder: Path, bases: Mapping[str, Path]) -> None:
    import tiny
    import torch

    if name == "llama-f16":
        tiny.in_dtype(bases["llama"], folder, torch.float16)
        return
    builders = {
        "llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.bert, "classifier": tiny.bert_classifier,
        "tagger": tiny.bert_tagger, "albert": tiny.albert, "vit": tiny.vit, "clip": tiny.clip,
        "t5": tiny.t5, "flan": partial(tiny.t5, untied=True, layers=(1, 1)), "bart": tiny.bart, "whisper": tiny.whisper,
    }  # fmt: skip
    builders[name](folder)


@dataclass(frozen=True)
class AdapterSpec:
    """How an adapter is trained: on which base, with which Transformers class, with which `LoraConfig`.

    Attributes:
        is_moved: All that is trainable is moved from its start (`tiny.trained`), not only pairs and saved modules.
    """

    base: str
    model_class: str
    options: Mapping[str, object]
    n_labels: int | None = None
    is_moved: bool = False


ADAPTERS: dict[str, AdapterSpec] = {
    "chat": AdapterSpec(
        "llama", "LlamaForCausalLM",
        {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    ),
    "code": AdapterSpec(
        "llama", "LlamaForCausalLM",
        {"task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 6, "use_rslora": True, "target_modules": "all-linear",
         "rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 3}, "alpha_pattern": {"k_proj": 2}},
    ),
    "speak": AdapterSpec(
        "llama", "LlamaForCausalLM",
        {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "lm_head"]},
    ),
    "voice": AdapterSpec(
        "llama", "LlamaForCausalLM",
        {"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "words": AdapterSpec(
        "llama", "LlamaForCausalLM",
        {"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "gains": AdapterSpec(
        "llama", "LlamaForCausalLM",
        {"task_type": "CAUSAL_LM", "r": 3, "use_dora": True, "target_modules": ["q_proj", "down_proj"]}, is_moved=True,
    ),
    "biases": AdapterSpec(
        "llama", "LlamaForCausalLM",
        {"task_type": "CAUSAL_LM", "r": 4, "lora_bias": True, "target_modules": ["q_proj", "v_proj"]}, is_moved=True,
    ),
    "tokens": AdapterSpec(
        "llama", "LlamaForCausalLM",
        {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["v_proj"], "trainable_token_indices": [5, 9, 70]},
        is_moved=True,
    ),
    "activated": AdapterSpec(
        "llama", "LlamaForCausalLM",
        {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"],
         "alora_invocation_tokens": [70, 71]},
        is_moved=True,
    ),
    "poet": AdapterSpec(
        "gpt2", "GPT2LMHeadModel",
        {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    ),
    "topic": AdapterSpec(
        "bert", "BertForSequenceClassification",
        {"task_type": "SEQ_CLS", "r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}, n_labels=3,
    ),
    "kind": AdapterSpec(
        "bert", "BertForSequenceClassification",
        {"task_type": "SEQ_CLS", "r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": ["query", "key", "dense"],
         "rank_pattern": {"key": 3}}, n_labels=5,
    ),
    "plain": AdapterSpec(
        "classifier", "BertForSequenceClassification",
        {"r": 4, "lora_alpha": 8, "target_modules": ["query", "pooler.dense", "classifier"]},
    ),
    "shades": AdapterSpec(
        "classifier", "BertForSequenceClassification",
        {"task_type": "SEQ_CLS", "r": 3, "lora_alpha": 6, "target_modules": ["query", "value"]}, n_labels=4,
    ),
    "tags": AdapterSpec(
        "tagger", "BertForTokenClassification",
        {"task_type": "TOKEN_CLS", "r": 3, "lora_alpha": 6, "target_modules": ["query", "value"]}, n_labels=6,
    ),
    "features": AdapterSpec(
        "bert", "BertModel",
        {"task_type": "FEATURE_EXTRACTION", "r": 3, "lora_alpha": 6, "target_modules": ["query", "value", "pooler.dense"]},
    ),
    "shared": AdapterSpec(
        "albert", "AlbertModel",
        {"task_type": "FEATURE_EXTRACTION", "r": 3, "lora_alpha": 6, "target_modules": ["query", "value", "ffn"]},
    ),
    "t5-attention": AdapterSpec(
        "t5", "T5ForConditionalGeneration",
        {"task_type": "SEQ_2_SEQ_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q", "v"]},
    ),
    "t5-all": AdapterSpec(
        "t5", "T5ForConditionalGeneration",
        {"task_type": "SEQ_2_SEQ_LM", "r": 3, "lora_alpha": 6, "target_modules": "all-linear", "rank_pattern": {"wo": 2}},
    ),
    "t5-head": AdapterSpec(
        "t5", "T5ForConditionalGeneration",
        {"task_type": "SEQ_2_SEQ_LM", "r": 3, "lora_alpha": 6, "target_modules": ["lm_head", "EncDecAttention.k"]},
    ),
    "t5-voice": AdapterSpec(
        "t5", "T5ForConditionalGeneration",
        {"task_type": "SEQ_2_SEQ_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "modules_to_save": ["lm_head"]},
    ),
    "t5-encoder": AdapterSpec(
        "t5", "T5ForConditionalGeneration",
        {"task_type": "SEQ_2_SEQ_LM", "r": 2, "lora_alpha": 8, "target_modules": r"encoder\..*\.(q|wi)"},
    ),
    "flan-attention": AdapterSpec(
        "flan", "T5ForConditionalGeneration",
        {"task_type": "SEQ_2_SEQ_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q", "v", "wi_0"]},
    ),
    "bart-attention": AdapterSpec(
        "bart", "BartForConditionalGeneration",
        {"task_type": "SEQ_2_SEQ_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    ),
    "bart-all": AdapterSpec(
        "bart", "BartForConditionalGeneration",
        {"task_type": "SEQ_2_SEQ_LM", "r": 3, "lora_alpha": 6, "target_modules": "all-linear"},
    ),
    "whisper-attention": AdapterSpec(
        "whisper", "WhisperForConditionalGeneration",
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    ),
    "whisper-all": AdapterSpec(
        "whisper", "WhisperForConditionalGeneration",
        {"task_type": "SEQ_2_SEQ_LM", "r": 3, "lora_alpha": 6, "target_modules": "all-linear"},
    ),
    "sights": AdapterSpec(
        "vit", "ViTForImageClassification",
        {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}, n_labels=5,
    ),
    "pairs": AdapterSpec(
        "clip", "CLIPModel",
        {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "fc1", "text_projection"]},
    ),
    "styles": AdapterSpec(
        "clip", "CLIPModel",
        {"r": 5, "lora_alpha": 5, "target_modules": ["q_proj", "visual_projection"]},
    ),
}  # fmt: skip


def make_adapter(name: str, folder: Path, bases: Mapping[str, Path]) -> None:
    import tiny
    from peft import LoraConfig

    spec = ADAPTERS[name]
    if spec.is_moved:
        tiny.trained(bases[spec.base], folder, spec.model_class, LoraConfig(**spec.options), spec.n_labels)
        return
    tiny.adapter(
        bases[spec.base], folder, spec.model_class, n_labels=spec.n_labels,
        save_embedding_layers=False, **spec.options,
    )  # fmt: skip


@dataclass(frozen=True)
class ExportSpec:
    """What one export of the catalogue is made of."""

    base: str
    adapters: tuple[str, ...]
    mode: str
    dtype: str | None = None
    targets: tuple[str, ...] = ()
    provider: str = "cpu"
    required_inputs: bool = False
    quantization: Quantization | None = None


# On one base, adapters of all kinds of input: pairs, gains, biases, tokens, a head, a gate.
KINDS = ("chat", "gains", "biases", "tokens", "voice", "activated")
INT4 = Quantization(bits=4, block_size=32)
EXPORTS: dict[str, ExportSpec] = {
    "llama-base": ExportSpec("llama", (), "merge"),
    "llama-dynamic": ExportSpec("llama", ("chat", "code"), "dynamic"),
    "llama-merged": ExportSpec("llama", ("chat",), "merge"),
    "llama-sum": ExportSpec("llama", ("chat", "code"), "merge"),
    "llama-untied": ExportSpec("llama", ("speak",), "merge"),
    "llama-head": ExportSpec("llama", ("speak",), "dynamic"),
    "llama-voice": ExportSpec("llama", ("voice",), "dynamic"),
    "llama-voice-merged": ExportSpec("llama", ("voice",), "merge"),
    "llama-words": ExportSpec("llama", ("words",), "merge"),
    "llama-cuda-base": ExportSpec("llama", (), "merge", provider="cuda"),
    "llama-cuda": ExportSpec("llama", ("chat",), "dynamic", provider="cuda"),
    "llama-f16": ExportSpec("llama-f16", ("chat",), "dynamic"),
    "llama-f16-merged": ExportSpec("llama-f16", ("chat",), "merge"),
    "llama-int4": ExportSpec("llama", ("chat", "code"), "dynamic", quantization=INT4),
    "llama-int4-merged": ExportSpec("llama", ("chat",), "merge", quantization=replace(INT4, symmetric=False)),
    "llama-f16-int8": ExportSpec("llama-f16", ("chat",), "dynamic", quantization=replace(INT4, bits=8)),
    "gpt2-int8-merged": ExportSpec("gpt2", ("poet",), "merge", quantization=replace(INT4, bits=8, keep=("lm_head",))),
    "llama-k-quant": ExportSpec("llama", ("chat",), "dynamic", quantization=replace(INT4, method=Method.K_QUANT)),
    "llama-hqq-merged": ExportSpec("llama", ("chat",), "merge", quantization=replace(INT4, method=Method.HQQ)),
    "gpt2-dynamic": ExportSpec("gpt2", ("poet",), "dynamic"),
    "gpt2-merged": ExportSpec("gpt2", ("poet",), "merge"),
    "bert-dynamic": ExportSpec("bert", ("topic", "kind"), "dynamic"),
    "bert-required": ExportSpec("bert", ("topic", "kind"), "dynamic", required_inputs=True),
    "llama-kinds": ExportSpec("llama", KINDS, "dynamic"),
    "llama-kinds-required": ExportSpec("llama", KINDS, "dynamic", required_inputs=True),
    "bert-merged": ExportSpec("bert", ("kind",), "merge"),
    "classifier-dynamic": ExportSpec("classifier", ("plain", "shades"), "dynamic"),
    "classifier-merged": ExportSpec("classifier", ("plain",), "merge"),
    "classifier-targets": ExportSpec("classifier", (), "dynamic", targets=("query", "pooler.dense")),
    "tagger-dynamic": ExportSpec("tagger", ("tags",), "dynamic"),
    "features-dynamic": ExportSpec("bert", ("features",), "dynamic"),
    "features-merged": ExportSpec("bert", ("features",), "merge"),
    "albert-dynamic": ExportSpec("albert", ("shared",), "dynamic"),
    "albert-merged": ExportSpec("albert", ("shared",), "merge"),
    "vit-dynamic": ExportSpec("vit", ("sights",), "dynamic"),
    "vit-merged": ExportSpec("vit", ("sights",), "merge"),
    "clip-dynamic": ExportSpec("clip", ("pairs", "styles"), "dynamic"),
    "clip-merged": ExportSpec("clip", ("pairs",), "merge"),
    "t5-dynamic": ExportSpec("t5", ("t5-attention", "t5-all"), "dynamic"),
    "t5-merged": ExportSpec("t5", ("t5-all",), "merge"),
    "t5-head-dynamic": ExportSpec("t5", ("t5-head", "t5-encoder"), "dynamic"),
    "t5-head-merged": ExportSpec("t5", ("t5-head",), "merge"),
    "t5-voice-dynamic": ExportSpec("t5", ("t5-voice",), "dynamic"),
    "t5-voice-merged": ExportSpec("t5", ("t5-voice",), "merge"),
    "flan-dynamic": ExportSpec("flan", ("flan-attention",), "dynamic"),
    "bart-dynamic": ExportSpec("bart", ("bart-attention", "bart-all"), "dynamic"),
    "bart-merged": ExportSpec("bart", ("bart-all",), "merge"),
    "whisper-dynamic": ExportSpec("whisper", ("whisper-attention", "whisper-all"), "dynamic"),
    "whisper-merged": ExportSpec("whisper", ("whisper-all",), "merge"),
}


def export_to(
    folder: Path, spec: ExportSpec, bases: Mapping[str, Path], adapters: Mapping[str, Path], **options: object
):
    """Export `spec` to `folder` through the pipeline, as the command line does; the manifest."""
    from lora_export.export.plan import Request
    from lora_export.pipeline import ExportOptions, export

    chosen = tuple((str(adapters[name]), name) for name in spec.adapters)
    given = {"dtype": spec.dtype, "provider": spec.provider, "quantization": spec.quantization}
    request = Request(str(bases[spec.base]), chosen, spec.mode, **given)
    how = {"targets": spec.targets, "required_inputs": spec.required_inputs}
    return export(request, ExportOptions(folder, **how, **options))
