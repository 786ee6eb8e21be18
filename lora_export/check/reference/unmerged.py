"""The reference: unmerged PEFT in PyTorch, in eval mode, at the export's dtype, and at a wider one beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from lora_export.base.checkpoint import Checkpoint, Located
from lora_export.base.tasks import Task, model_class
from lora_export.base.weightless import TORCH_DTYPES, build_weightless
from lora_export.check.reference.on_integers import IntegerBase, Switch
from lora_export.check.reference.sentence import SentenceReference
from lora_export.check.reference.trained import TrainedAdapter, adds_up, untied, vocabulary_of, with_one, with_several
from lora_export.check.reference.widened import Narrowed, is_lazy, share_weights, wholly_widened, widened
from lora_export.export.weights import as_numpy
from lora_export.quiet import quiet
from lora_export.sentence import SENTENCE_EMBEDDING

# What rounding at a dtype is told from.
WIDER = {"float16": "float32", "bfloat16": "float32", "float32": "float64"}
_DTYPES = TORCH_DTYPES | {"float64": torch.float64}
_OUTPUTS = (
    "logits", "start_logits", "end_logits", "predicted_depth", "logits_per_image", "logits_per_text", "text_embeds",
    "image_embeds", SENTENCE_EMBEDDING, "last_hidden_state", "pooler_output", "encoder_last_hidden_state",
)  # fmt: skip


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
        shared: Callable[[object, Callable[[], torch.nn.Module]], torch.nn.Module] | None = None,
    ) -> None:
        self._integers, self._shared, self._sentence = integers, shared, sentence
        self._task, self._base, self._n_labels = task, base, n_labels
        self._dtype, self._pad_token_id = _DTYPES[dtype], pad_token_id
        with quiet():
            if merged:
                model = self._folded(adapters)
            elif not adapters:
                model = self._load(self._dtype)
            elif len(adapters) == 1 and adapters[0].weight == 1:
                model = with_one(self._load_for(adapters[0], self._dtype), adapters[0])
            elif all(map(adds_up, adapters)):
                model = with_several(self._load(self._dtype), adapters)
            else:
                model = self._summed(adapters)
        if self._dtype is torch.float64:
            model = widened(model)
        self._model = model.eval().requires_grad_(False)
        self.precise = None
        if with_precise:
            self.precise = Reference(
                task, base, adapters, dtype=WIDER[dtype], n_labels=n_labels, pad_token_id=pad_token_id,
                integers=integers and replace(integers, switch=Switch()), merged=merged, sentence=sentence,
            )  # fmt: skip
            share_weights(self.precise._model, self._model)

    def _load(self, dtype: torch.dtype) -> torch.nn.Module:
        if self._shared is None:
            return self._loaded(dtype)
        return self._shared((self._base, dtype, self._n_labels), lambda: self._loaded(dtype))

    def _loaded(self, dtype: torch.dtype) -> torch.nn.Module:
        from transformers import AutoConfig

        options = {} if self._n_labels is None else {"num_labels": self._n_labels, "ignore_mismatched_sizes": True}
        if dtype is torch.float64:
            options["experts_implementation"] = "eager"  # the grouped product of a mixture has no float64
            dtype = torch.float32  # starts that change the base (PiSSA) want it so; made float64 once that is done
        checkpoint = Checkpoint.open(Located(self._base, str(self._base)))
        if checkpoint.quantization is None:
            config = AutoConfig.from_pretrained(self._base, trust_remote_code=False, local_files_only=True)
            model = model_class(self._task, config).from_pretrained(
                self._base, dtype=dtype, trust_remote_code=False, local_files_only=True, **options
            )
        else:
            state = {name: checkpoint.files.read(name) for name in checkpoint.files.tensors}
            config = checkpoint.load_config(**{name: n for name, n in options.items() if name == "num_labels"})
            options.pop("num_labels", None)
            kind = type(build_weightless(self._task, config, "float32"))  # an auto class wants a folder
            model = kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype, **options)
        if self._pad_token_id is not None:
            model.config.get_text_config().pad_token_id = self._pad_token_id
        is_of_base = self._integers is not None and not self._integers.is_merged
        return self._integers.put_in(model) if is_of_base else model

    def _load_for(self, adapter: TrainedAdapter, dtype: torch.dtype) -> torch.nn.Module:
        """The base as the adapter was trained on it: with the vocabulary that its file has."""
        model = self._load(dtype)
        n_tokens = vocabulary_of(adapter.path, model)
        if n_tokens is not None:
            model.resize_token_embeddings(n_tokens, mean_resizing=False)
        return model

    def _folded(self, adapters: Sequence[TrainedAdapter]) -> torch.nn.Module:
        """The adapters in the weights, as PEFT merges them; then, where they are quantized, those of the export."""
        if len(adapters) == 1 and adapters[0].weight == 1:
            model = untied(self._load_for(adapters[0], torch.float32))
            model = with_one(model, adapters[0]).merge_and_unload().to(self._dtype)
        elif adapters:
            model = self._summed(adapters)
        else:
            model = self._load(self._dtype)
        return model if self._integers is None else self._integers.put_in(model)

    @contextlib.contextmanager
    def rounding_activations(self) -> Iterator[None]:
        """Quantized products round what they multiply by to 8-bit integers, as the graph lets them."""
        self._integers.switch.is_on = True
        try:
            yield
        finally:
            self._integers.switch.is_on = False

    def _summed(self, adapters: Sequence[TrainedAdapter]) -> torch.nn.Module:
        model = untied(self._load(torch.float32))
        base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        total = {name: tensor.clone() for name, tensor in base.items()}
        for adapter in adapters:
            merged = with_one(untied(self._load(torch.float32)), adapter).merge_and_unload().state_dict()
            for name, tensor in total.items():
                if tensor.is_floating_point():
                    tensor += adapter.weight * (merged[name] - base[name])
        model.load_state_dict(total)
        return model.to(self._dtype)

    @property
    def module(self) -> torch.nn.Module:
        """What a run calls."""
        return self._callable()

    @property
    def inner(self) -> torch.nn.Module:
        """The base's own model, whose modules go by the base's paths."""
        return self._model.get_base_model() if hasattr(self._model, "get_base_model") else self._model

    @contextlib.contextmanager
    def eager_attention(self) -> Iterator[None]:
        """Attention operation by operation, so that what is inside can be seen."""
        from transformers import PreTrainedModel

        inner = next(m for m in self._model.modules() if isinstance(m, PreTrainedModel))
        before = inner.config._attn_implementation
        inner.set_attn_implementation("eager")
        try:
            yield
        finally:
            inner.set_attn_implementation(before)

    def _callable(self) -> torch.nn.Module:
        # PEFT's own forward for this task type names text inputs; the pairs are in the base's modules all the same.
        is_wrapped = hasattr(self._model, "get_base_model")
        return self._model.get_base_model() if is_wrapped and self._task is Task.SPEECH_RECOGNITION else self._model

    def run(self, inputs: dict[str, np.ndarray], *, n_generated: int = 0) -> dict[str, np.ndarray]:
        """Outputs (`logits`, `last_hidden_state`, …) in float32 or float64, `[batch, …]`, without a cache.

        Args:
            n_generated: How many of the last tokens were generated: an activated LoRA looks for its invocation in what
                came before them.
        """
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        tensors = {name: t.to(self._dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        with torch.no_grad(), self._default_dtype():
            try:
                found = self._callable()(**tensors, **self._offsets(tensors, n_generated))
            except (Narrowed, RuntimeError):  # the latter of products of two dtypes
                if not is_lazy(self._model):
                    raise
                self._model = wholly_widened(self._model)
                found = self._callable()(**tensors, **self._offsets(tensors, n_generated))
            if self._sentence is not None:
                found[SENTENCE_EMBEDDING] = self._sentence(found["last_hidden_state"], tensors["attention_mask"])
        names = [name for name in _OUTPUTS if found.get(name) is not None]
        shown = torch.promote_types(self._dtype, torch.float32)
        return {name: as_numpy(found[name].to(shown)) for name in names}

    def _default_dtype(self) -> contextlib.AbstractContextManager[None]:
        """The dtype of numbers that a model makes on its way: the least float64 (XGLM's mask) is none of float32.

        PEFT's other tuners make theirs on their way too, and keep their parameters in float32 (FourierFT).
        """
        from peft import PeftType  # which an export that checks nothing need not import

        tuners = getattr(self._model, "peft_config", {}).values()
        if any(config.peft_type != PeftType.LORA for config in tuners):
            return contextlib.nullcontext()
        return _default_dtype(torch.promote_types(self._dtype, torch.float32))

    def _offsets(self, tensors: dict[str, torch.Tensor], n_generated: int) -> dict[str, list[int | None]]:
        """Where an activated LoRA begins, counted from the end, as PEFT finds it; nothing for other adapters."""
        from peft.tuners.lora.variants import calculate_alora_offsets, is_alora_relevant_in_batch

        if not hasattr(self._model, "peft_config") or not is_alora_relevant_in_batch(self._model):
            return {}
        ids = tensors["input_ids"]
        prompt = ids[:, : ids.shape[1] - n_generated]
        found = calculate_alora_offsets(self._model.peft_config, self._model.active_adapter, prompt)
        return {"alora_offsets": [None if offset is None else offset + n_generated for offset in found]}

    @contextlib.contextmanager
    def without_pairs(self) -> Iterator[None]:
        """The same model with its adapted layers off, replaced modules (heads) staying."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        with contextlib.ExitStack() as stack:
            if self.precise is not None:
                stack.enter_context(self.precise.without_pairs())
            layers = [module for module in self._model.modules() if isinstance(module, BaseTunerLayer)]
            if not layers:  # summed as weights
                stack.enter_context(self.without_adapter())
            for layer in layers:
                layer.enable_adapters(False)
                stack.callback(layer.enable_adapters, True)
            yield

    @contextlib.contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The base alone, its own head included."""
        if hasattr(self._model, "disable_adapter"):
            with self._model.disable_adapter():
                yield
            return
        base = self._load(self._dtype)
        base = widened(base) if self._dtype is torch.float64 else base.to(self._dtype)
        changed, self._model = self._model, base.eval().requires_grad_(False)
        try:
            yield
        finally:
            self._model = changed


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    original = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(original)
