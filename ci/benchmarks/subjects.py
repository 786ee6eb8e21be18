"""The exports that `mutations.py` damages, and those that it leaves as they are: tiny bases, real adapters."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import transformers
from adapter_options import OPTIONS, REFUSED, AdapterOption, tokens
from adapter_values import Arrays
from architectures import CATALOGUE, Architecture

from lora_export.artifact import REPORTS, ExportKind
from lora_export.check.context import CheckOptions
from lora_export.check.results import CheckReport
from lora_export.errors import LoraExportError
from lora_export.export.plan import Request
from lora_export.integrity.sources import SourceOverrides
from lora_export.pipeline import ExportOptions, check, export

DTYPES = ("float32", "float16", "bfloat16")
KINDS = tuple(ExportKind)
_EVERY = (
    "lora", "dora", "rslora", "rank_pattern", "modules_to_save", "bias", "lora_bias", "trainable_tokens", "embedding",
)  # fmt: skip
_BY_NAME = {option.name: option for option in OPTIONS}
# Half of the vocabulary, so that every text has some of them.
_TOKENS = replace(_BY_NAME["trainable_tokens"], config=partial(tokens, chosen=range(4, 304)))
_BY_NAME["trainable_tokens"] = _TOKENS
# What is exported of each architecture: every option where its task has no other, else what only it shows.
_OPTIONS = {
    "BERT, features": ("lora", "dora", "rslora", "modules_to_save", "embedding"),
    "BERT": _EVERY,
    "ModernBERT": ("lora", "dora", "rslora", "modules_to_save", "trainable_tokens"),
    "ViT": ("lora", "dora", "rank_pattern", "modules_to_save", "bias", "lora_bias"),
    "CLIP": ("lora", "rslora", "trainable_tokens"),
    "Llama": (*_EVERY, "alora"),
    "GPT-2": ("lora", "dora", "bias", "lora_bias", "trainable_tokens"),
    "OPT": ("lora",),
    "T5": ("lora", "dora", "rslora", "rank_pattern"),
    "BART": ("lora", "bias", "lora_bias"),
}


@dataclass(frozen=True)
class Subject:
    """What is exported: an architecture's base with adapters of one option, in one dtype and kind."""

    architecture: str
    option: AdapterOption
    dtype: str
    kind: ExportKind

    @property
    def base(self) -> Architecture:
        found = CATALOGUE[self.architecture]
        # Query and value in one adapter, to swap them.
        return replace(found, targets=["query", "value", "dense"]) if self.architecture == "BERT" else found

    @property
    def mode(self) -> str:
        return "merge" if self.kind is ExportKind.MERGED else "dynamic"

    @property
    def is_exported(self) -> bool:
        """Whether the architecture has such adapters, and the package exports them so."""
        has_any = self.option.config(self.base, 1) is not None
        return has_any and self.option.expected(self.architecture, self.mode) != REFUSED

    @property
    def brings_head(self) -> bool:
        """Whether its adapters bring a head of their own, as PEFT has it for a classification."""
        return self.option.name == "modules_to_save" or (self.base.task_type or "").endswith("CLS")


def subjects(architectures: Sequence[str], dtypes: Sequence[str]) -> Iterator[Subject]:
    """All that is exported of `architectures`, kinds of one option side by side."""
    for name in architectures:
        for option in _OPTIONS[name]:
            for dtype in dtypes:
                for kind in KINDS:
                    subject = Subject(name, _BY_NAME[option], dtype, kind)
                    if subject.is_exported:
                        yield subject


ARCHITECTURES = tuple(_OPTIONS)


def export_subject(subject: Subject, base: Path, adapters: Sequence[Path], folder: Path) -> None:
    """Export `adapters` on `base` to `folder`, in the kind and dtype of `subject`."""
    chosen = tuple((str(path), path.name) for path in adapters)
    request = Request(str(base), chosen, subject.mode, subject.base.task, subject.dtype, "cpu")
    export(request, ExportOptions(folder, overwrite=True))


def checked(folder: Path) -> CheckReport | LoraExportError:
    """What `check` says of the export in `folder`: its report, or its refusal."""
    try:
        return check(folder, SourceOverrides(), CheckOptions(provider="cpu"))[0]
    except LoraExportError as error:
        return error


def copy_of(export_folder: Path, folder: Path) -> Path:
    """A copy of an export to damage, without the reports of the sound one."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(export_folder, folder, ignore=shutil.ignore_patterns(REPORTS))
    return folder


def base_arrays(subject: Subject, base: Path) -> Arrays:
    """The base's parameters as Transformers loads them, float32, by path."""
    model = getattr(transformers, subject.base.auto).from_pretrained(base)
    return {name: tensor.numpy().astype(np.float32) for name, tensor in model.state_dict().items()}
