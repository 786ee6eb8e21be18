"""What a decoder is traced with: new tokens on a past of keys and values, whose shapes the model itself tells.

    input_ids, attention_mask, position_ids (where the model takes them), past_key_values → logits, present

A layer's keys may have other numbers of heads and other sizes than its values or than another layer's: multi-query
Falcon, multi-head latent attention (DeepSeek), Gemma 4. A model that keeps a state of another kind is refused.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator

import torch

from lora_export.base.forward import cache_argument
from lora_export.base.sample import Sample
from lora_export.base.tasks import is_multimodal
from lora_export.compat import borrow
from lora_export.errors import InputRefused, some_of
from lora_export.quiet import quiet

# Different from each other and from usual model sizes, so that none is taken for another.
_BATCH, _SEQUENCE, _PAST = 2, 7, 5
# What Transformers calls the layers of a cache that hold keys and values, or nothing, as another layer's serve them.
_KEYS_AND_VALUES = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
# Heads and size of a layer's keys, and of its values.
Shapes = tuple[tuple[int, int], tuple[int, int]]


def decoder_sample(model: torch.nn.Module) -> Sample:
    """The sample of a weightless decoder, or of the language model of a multimodal one."""
    from transformers import DynamicCache

    by_layer = cache_shapes(model)
    # Without the config: every layer keeps its whole past, also one with a sliding window, whose mask forgets for it.
    cache = DynamicCache()
    for layer, shapes in enumerate(by_layer):
        states = (torch.zeros(_BATCH, heads, _PAST, size, dtype=model.dtype) for heads, size in shapes)
        cache.update(*states, layer)
    inputs = {
        "input_ids": torch.ones(_BATCH, _SEQUENCE, dtype=torch.long),
        "attention_mask": torch.ones(_BATCH, _PAST + _SEQUENCE, dtype=torch.long),
        "position_ids": torch.arange(_PAST, _PAST + _SEQUENCE).expand(_BATCH, -1).clone(),
        cache_argument(model.forward): cache,
        "use_cache": True,
    }
    if not _takes_positions(model):
        del inputs["position_ids"]
    batch = torch.export.Dim("batch_size", max=2**20)
    sequence, past = (torch.export.Dim(name, max=_longest(model) // 2) for name in ("sequence_length", "past"))
    shapes = {name: {0: batch, 1: sequence} for name in ("input_ids", "position_ids") if name in inputs}
    shapes["attention_mask"] = {0: batch, 1: torch.export.Dim.AUTO}
    shapes[cache_argument(model.forward)] = [{0: batch, 2: past}] * (2 * len(by_layer))
    return Sample(inputs, shapes, {}, n_cached_layers=len(by_layer))


def _longest(model: torch.nn.Module) -> int:
    """How many tokens the model's tables of masks have room for (GPT-Neo); past and new ones together are no more."""
    tables = (buffer.shape for name, buffer in model.named_buffers() if name.endswith("attention.bias"))
    return min((shape[-1] for shape in tables if len(shape) == 4 and shape[-1] == shape[-2]), default=2**21)


def _takes_positions(model: torch.nn.Module) -> bool:
    """Whether the model takes its tokens' positions; with ALiBi (BLOOM, MPT) they follow from the mask, and RoBERTa,
    whose first position is not 0, finds them itself."""
    if any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules()):
        return False
    forwards = (part.forward for part in (model, getattr(model, "base_model", model)))
    return any("position_ids" in inspect.signature(forward).parameters for forward in forwards)


def cache_shapes(model: torch.nn.Module) -> tuple[Shapes, ...]:
    """The shapes of the keys and values that each layer of a weightless decoder adds to a cache, by a run of shapes
    alone. Layers that share those of another have none of their own (Gemma 3n)."""
    from transformers import DynamicCache

    fake, environment = borrow("FakeTensorMode"), borrow("ShapeEnv")
    cache = DynamicCache()
    token = torch.ones(1, 1, dtype=torch.long)
    shapes_only = fake(allow_non_fake_inputs=True, shape_env=environment())
    with quiet(), torch.no_grad(), _any_dtype_for_experts(model), shapes_only:
        found = model(input_ids=token, attention_mask=token, use_cache=True, **{cache_argument(model.forward): cache})
    config = model.config.get_text_config(decoder=True)
    has_none = not cache.layers or all(found.get(name) is None for name in ("cache", "past_key_values"))
    # RoFormer's and its kin's layers return a cache that the model's own mask makes no sense of.
    is_encoder = not config.is_encoder_decoder and (
        (has_none and getattr(config, "is_decoder", True) is False)
        or any(getattr(module, "is_decoder", None) is False for module in model.modules())
    )
    if has_none or is_encoder:
        raise InputRefused(
            f"A {model.config.model_type} base keeps no keys and values from one token to the next",
            where=f"config.json: model_type {model.config.model_type}",
            expected="a decoder with a cache",
            found="is_decoder is false: each token sees those after it" if is_encoder else None,
            next_step="try another --task" if is_encoder else "serve it with Transformers and PEFT",
        )
    states = ((layer.keys, layer.values) for layer in cache.layers)
    return tuple(((k.shape[1], k.shape[3]), (v.shape[1], v.shape[3])) for k, v in states)


@contextlib.contextmanager
def _any_dtype_for_experts(model: torch.nn.Module) -> Iterator[None]:
    """The grouped product of a mixture tells its shape in bfloat16 only; the batched one in any dtype."""
    if not model._can_set_experts_implementation():
        yield
        return
    original = model.get_experts_implementation()
    model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        model.set_experts_implementation(original)


def language_model_of(model: torch.nn.Module) -> str | None:
    """The path of the language model in a multimodal one, which alone is traced; None for a model of text alone.

    Raises:
        InputRefused: Its language model is no decoder (Florence-2).
    """
    if not is_multimodal(type(model).__name__):
        return None
    config = model.config
    if config.is_encoder_decoder or config.get_text_config(decoder=True).is_encoder_decoder:
        raise InputRefused(
            f"A {config.model_type} base is multimodal, and its language model is no decoder that runs alone",
            where=f"config.json: model_type {config.model_type}",
            next_step="serve it with Transformers and PEFT",
        )
    decoder = model.get_decoder()
    return next(path for path, module in model.named_modules() if module is decoder)


def refuse_other_states(model: torch.nn.Module) -> None:
    """Refuse a decoder that keeps more than keys and values: Mamba, Jamba, Qwen3-Next, LFM2.

    Raises:
        InputRefused: It is one; its layers are named.
    """
    from transformers import DynamicCache

    config = model.config.get_text_config(decoder=True)
    kinds = {type(layer).__name__ for layer in DynamicCache(config=config).layers}
    if not model._is_stateful and kinds <= set(_KEYS_AND_VALUES):
        return
    layers = set(getattr(config, "layer_types", None) or [])
    raise InputRefused(
        f"A {model.config.model_type} base keeps a state beside keys and values, which no exported decoder carries",
        where=f"config.json: model_type {model.config.model_type}",
        expected="layers of attention with a cache of keys and values",
        found=some_of(sorted(layers), 6) if layers else "a recurrent or state-space model",
        next_step="serve it with Transformers and PEFT",
    )
