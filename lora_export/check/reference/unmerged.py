"""The reference: unmerged PEFT in PyTorch, in eval mode, at the export's dtype, and at a wider one beside it."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from lora_export.base.tasks import Task
from lora_export.base.weightless import TORCH_DTYPES, as_numpy
from lora_export.check.reference.bases import SharedBases
from lora_export.check.reference.models import Loader, ModelSource, inner_of
from lora_export.check.reference.on_integers import IntegerBase
from lora_export.check.reference.sentence import SentenceReference
from lora_export.check.reference.trained import TrainedAdapter
from lora_export.check.reference.widened import Narrowed, is_lazy, share_weights, wholly_widened
from lora_export.check.turns import Turns
from lora_export.sentence import SENTENCE_EMBEDDING

# What rounding at a dtype is told from.
WIDER = {"float16": "float32", "bfloat16": "float32", "float32": "float64"}
_DTYPES = TORCH_DTYPES | {"float64": torch.float64}
_OUTPUTS = (
    "logits", "start_logits", "end_logits", "predicted_depth", "logits_per_image", "logits_per_text", "text_embeds",
    "image_embeds", SENTENCE_EMBEDDING, "last_hidden_state", "pooler_output", "encoder_last_hidden_state",
)  # fmt: skip


class Off(enum.Enum):
    """What of an adapter a run leaves out."""

    NOTHING = "nothing"
    PAIRS = "its pairs"
    ADAPTER = "all of it"


class Reference:
    """A base, with adapters or none, as PEFT runs it.

    One adapter, or several whose outputs PEFT adds up, run unmerged. Several that PEFT cannot add up at run time are
    summed as weights: `W0 + Σ w·(W_k − W0)`, each `W_k` merged by PEFT alone, in float32.

    Args:
        adapters: All active at once; none for the base alone.
        dtype: "float32", "float16", "bfloat16" or "float64".
        n_labels: Size of the head to build; None for the base's own.
        with_precise: Whether to keep the same model at a wider dtype as well.
        pad_token_id: Of a classifier on a decoder; None for what the base's config says.
        integers: The quantized weights to multiply by; None for those of the base. Of a merged export, what its
            adapters do to all other weights is taken from PEFT, and `merged` tells that they are in the weights.
        sentence: What makes an embedding of hidden states; None for none.
        shared: Called with a key and what loads the base of that key, for a caller that keeps loaded bases. The
            adapters' start must not change the base.
        turns: Whose it is to be in memory: the model is let go when it is another's, and made again when it is needed.

    Attributes:
        precise: The same at the wider dtype, whose distance from this one is PyTorch's rounding; None without.
    """

    def __init__(
        self,
        task: Task,
        base: Path,
        adapters: Sequence[TrainedAdapter],
        *,
        dtype: str,
        n_labels: int | None,
        with_precise: bool = False,
        pad_token_id: int | None = None,
        integers: IntegerBase | None = None,
        merged: bool = False,
        sentence: SentenceReference | None = None,
        shared: Loader | None = None,
        turns: Turns | None = None,
    ) -> None:
        self._task, self._dtype, self._sentence = task, _DTYPES[dtype], sentence
        self._source = ModelSource(
            task, base, adapters, self._dtype, n_labels=n_labels, pad_token_id=pad_token_id, integers=integers,
            is_merged=merged,
        )  # fmt: skip
        self._integers, self._rounds, self._off = integers, False, Off.NOTHING
        self._shared, self.turns = shared, turns or Turns()
        self._owner: Reference = self
        self._bases = SharedBases()
        self._built: torch.nn.Module | None = None
        self.precise: Reference | None = None
        if with_precise:
            how = {"n_labels": n_labels, "pad_token_id": pad_token_id, "integers": integers, "merged": merged}
            self.precise = Reference(task, base, adapters, dtype=WIDER[dtype], sentence=sentence, turns=turns, **how)
            self.precise._owner = self

    def let_go(self) -> None:
        """Keep no model; the next run makes it again."""
        for each in filter(None, (self, self.precise)):
            each._built, each._bases = None, SharedBases()

    @property
    def _model(self) -> torch.nn.Module:
        """The model, made if it is not there; with its adapters on, whatever a run leaves out."""
        self.turns.take(self._owner)
        if self._built is None:
            self._built = self._source.model(self._loader)
            self._owner._share()
        return self._built

    @property
    def _loader(self) -> Loader | None:
        """What has the base loaded: this one's and the precise one's once, where both are of the same numbers."""
        owner = self._owner
        is_shared = owner.precise is not None and owner._dtype is torch.float32 and self._source.leaves_base
        return owner._bases.model if is_shared else self._shared

    def _share(self) -> None:
        if self.precise is not None and self.precise._built is not None and self._built is not None:
            share_weights(self.precise._built, self._built)

    @contextlib.contextmanager
    def rounding_activations(self) -> Iterator[None]:
        """Quantized products round what they multiply by to 8-bit integers, as the graph lets them."""
        self._rounds = True
        try:
            yield
        finally:
            self._rounds = False

    @property
    def module(self) -> torch.nn.Module:
        """What a run calls."""
        return self._callable(self._asked._model)

    @property
    def inner(self) -> torch.nn.Module:
        """The base's own model, whose modules go by the base's paths."""
        return inner_of(self._asked._model)

    @contextlib.contextmanager
    def eager_attention(self) -> Iterator[None]:
        """Attention operation by operation, so that what is inside can be seen."""
        from transformers import PreTrainedModel

        inner = next(m for m in self._asked._model.modules() if isinstance(m, PreTrainedModel))
        before = inner.config._attn_implementation
        inner.set_attn_implementation("eager")
        try:
            yield
        finally:
            inner.set_attn_implementation(before)

    def _callable(self, model: torch.nn.Module) -> torch.nn.Module:
        # PEFT's own forward for this task type names text inputs; the pairs are in the base's modules all the same.
        return inner_of(model) if self._task is Task.SPEECH_RECOGNITION else model

    def run(self, inputs: dict[str, np.ndarray], *, n_generated: int = 0) -> dict[str, np.ndarray]:
        """Outputs (`logits`, `last_hidden_state`, …) in float32 or float64, `[batch, …]`, without a cache.

        Args:
            n_generated: How many of the last tokens were generated: an activated LoRA looks for its invocation in what
                came before them.
        """
        if self._asked is not self:
            return self._asked.run(inputs, n_generated=n_generated)
        model = self._model
        if self._integers is not None:
            self._integers.switch.is_on = self._rounds
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        tensors = {name: t.to(self._dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        with torch.no_grad(), self._default_dtype(model), self._left_out(model):
            offsets = _offsets(model, tensors, n_generated)
            try:
                found = self._callable(model)(**tensors, **offsets)
            except (Narrowed, RuntimeError):  # the latter of products of two dtypes
                if not is_lazy(model):
                    raise
                found = self._callable(wholly_widened(model))(**tensors, **offsets)
            if self._sentence is not None:
                found[SENTENCE_EMBEDDING] = self._sentence(found["last_hidden_state"], tensors["attention_mask"])
        names = [name for name in _OUTPUTS if found.get(name) is not None]
        shown = torch.promote_types(self._dtype, torch.float32)
        return {name: as_numpy(found[name].to(shown)) for name in names}

    def _default_dtype(self, model: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
        """The dtype of numbers that a model makes on its way: the least float64 (XGLM's mask) is none of float32.

        PEFT's other tuners make theirs on their way too, and keep their parameters in float32 (FourierFT).
        """
        from peft import PeftType  # which an export that checks nothing need not import

        tuners = getattr(model, "peft_config", {}).values()
        if any(config.peft_type != PeftType.LORA for config in tuners):
            return contextlib.nullcontext()
        return _default_dtype(torch.promote_types(self._dtype, torch.float32))

    @contextlib.contextmanager
    def _left_out(self, model: torch.nn.Module) -> Iterator[None]:
        """What of the adapters is off, off in `model`."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        with contextlib.ExitStack() as stack:
            if self._off is Off.ADAPTER and self._source.adapters:
                stack.enter_context(model.disable_adapter())
            elif self._off is Off.PAIRS:
                for layer in (module for module in model.modules() if isinstance(module, BaseTunerLayer)):
                    layer.enable_adapters(False)
                    stack.callback(layer.enable_adapters, True)
            yield

    @property
    def _asked(self) -> Reference:
        """What computes what is asked for now: where adapters are in the weights and off, the base."""
        if self._off is Off.NOTHING or self._source.is_unmerged or not self._source.adapters:
            return self
        return self._alone

    @cached_property
    def _alone(self) -> Reference:
        source, dtype = self._source, str(self._dtype).removeprefix("torch.")
        how = {"n_labels": source.n_labels, "pad_token_id": source.pad_token_id, "integers": source.integers}
        return Reference(self._task, source.base, [], dtype=dtype, sentence=self._sentence, turns=self.turns, **how)

    @contextlib.contextmanager
    def without_pairs(self) -> Iterator[None]:
        """The same model with its adapted layers off, replaced modules (heads) staying."""
        with contextlib.ExitStack() as stack:
            for each in filter(None, (self, self.precise)):
                stack.enter_context(each._leaving_out(Off.PAIRS))
            yield

    @contextlib.contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The base alone, its own head included."""
        with self._leaving_out(Off.ADAPTER):
            yield

    @contextlib.contextmanager
    def _leaving_out(self, off: Off) -> Iterator[None]:
        before, self._off = self._off, off
        try:
            yield
        finally:
            self._off = before


def _offsets(model: torch.nn.Module, tensors: dict[str, torch.Tensor], n_generated: int) -> dict[str, list[int | None]]:
    """Where an activated LoRA begins, counted from the end, as PEFT finds it; nothing for other adapters."""
    from peft.tuners.lora.variants import calculate_alora_offsets, is_alora_relevant_in_batch

    if not hasattr(model, "peft_config") or not is_alora_relevant_in_batch(model):
        return {}
    ids = tensors["input_ids"]
    prompt = ids[:, : ids.shape[1] - n_generated]
    found = calculate_alora_offsets(model.peft_config, model.active_adapter, prompt)
    return {"alora_offsets": [None if offset is None else offset + n_generated for offset in found]}


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    original = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(original)
