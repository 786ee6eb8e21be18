"""How an encoder-decoder is taken apart into the three graphs that Optimum runs, with Optimum's names.

    encoder_model             input_ids, attention_mask (text) or input_features (speech) → last_hidden_state
    decoder_model             encoder_attention_mask (text), input_ids, encoder_hidden_states
                              → logits, present.{i}.decoder.key|value, present.{i}.encoder.key|value
    decoder_with_past_model   encoder_attention_mask (text), input_ids, past_key_values.{i}.decoder|encoder.key|value
                              → logits, present.{i}.decoder.key|value

Each is a `forward` traced on the whole model, so that parameters and modules keep the paths that PEFT uses. A decoder
takes any number of new tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch

from lora_export.base.forward import cache_argument
from lora_export.base.sample import Sample
from lora_export.contract import DECODER, ENCODER

# Different from each other and from usual model sizes, so that none is taken for another.
_BATCH, _SOURCE, _TARGET, _PAST = 2, 11, 7, 5
_BATCH_AXIS, _SOURCE_AXIS, _TARGET_AXIS, _PAST_AXIS = (
    "batch_size", "encoder_sequence_length", "decoder_sequence_length", "past_decoder_sequence_length",
)  # fmt: skip
_TEXT_AXES = {0: _BATCH_AXIS, 1: _SOURCE_AXIS}


def seq2seq_sample(model: torch.nn.Module, graph: str) -> Sample:
    """What to trace for `graph`, one of the three stems above."""
    if graph == ENCODER:
        return _encoder_sample(model)
    return _decoder_sample(model) if graph == DECODER else _decoder_with_past_sample(model)


def _takes_text(model: torch.nn.Module) -> bool:
    return model.main_input_name == "input_ids"


def _source_length(model: torch.nn.Module) -> int:
    return _SOURCE if _takes_text(model) else model.config.max_source_positions


def _encoder_sample(model: torch.nn.Module) -> Sample:
    encoder = model.get_encoder()

    def forward(**inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        with _clamped_always():
            return {"last_hidden_state": encoder(**inputs).last_hidden_state}

    if _takes_text(model):
        tokens = torch.ones(_BATCH, _SOURCE, dtype=torch.long)
        inputs = {"input_ids": tokens, "attention_mask": tokens.clone()}
        return _sample(forward, inputs, dict.fromkeys(inputs, _TEXT_AXES))
    # Two frames of the spectrogram a position, after the second convolution.
    frames = 2 * model.config.max_source_positions
    features = torch.zeros(_BATCH, model.config.num_mel_bins, frames, dtype=model.dtype)
    return _sample(forward, {"input_features": features}, {"input_features": {0: _BATCH_AXIS}})


class _Overflowed:
    def all(self) -> bool:
        return False


@contextlib.contextmanager
def _clamped_always() -> Iterator[None]:
    """Let Bart's encoder clamp its states in float16 whatever they are, and not only once one has overflowed.

    A graph has no such question; states that have not overflowed are left as they are either way, but for the last
    thousand below the largest number of float16.
    """
    original = torch.isfinite
    torch.isfinite = lambda tensor: _Overflowed()
    try:
        yield
    finally:
        torch.isfinite = original


def _decoder_sample(model: torch.nn.Module) -> Sample:
    from transformers import DynamicCache, EncoderDecoderCache

    whole = model.forward

    def forward(input_ids, encoder_hidden_states, encoder_attention_mask=None) -> dict[str, torch.Tensor]:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        outputs = whole(
            decoder_input_ids=input_ids,
            encoder_outputs=(encoder_hidden_states,),
            use_cache=True,
            **{cache_argument(whole): cache},
            **_mask(encoder_attention_mask),
        )
        return {"logits": outputs.logits, **_present(cache, ("decoder", "encoder"))}

    inputs, axes = _decoder_inputs(model)
    width = model.config.d_model
    inputs["encoder_hidden_states"] = torch.zeros(_BATCH, _source_length(model), width, dtype=model.dtype)
    return _sample(forward, inputs, axes | {"encoder_hidden_states": _TEXT_AXES})


def _decoder_with_past_sample(model: torch.nn.Module) -> Sample:
    from transformers import DynamicCache, EncoderDecoderCache

    whole, width = model.forward, model.config.d_model
    n_layers, n_heads, head_size = _cache_sizes(model.config)

    def forward(input_ids, past_key_values, encoder_attention_mask=None) -> dict[str, torch.Tensor]:
        own, cross = DynamicCache(), DynamicCache()
        for layer in range(n_layers):
            own.update(*past_key_values[4 * layer : 4 * layer + 2], layer)
            cross.update(*past_key_values[4 * layer + 2 : 4 * layer + 4], layer)
        cache = EncoderDecoderCache(own, cross)
        # Only the shape is read: the cross-attention's keys and values are in the cache.
        n_rows, source_length = input_ids.shape[0], past_key_values[2].shape[2]
        outputs = whole(
            decoder_input_ids=input_ids,
            encoder_outputs=(past_key_values[2].new_zeros((n_rows, source_length, width)),),
            use_cache=True,
            **{cache_argument(whole): cache},
            **_mask(encoder_attention_mask),
        )
        return {"logits": outputs.logits, **_present(cache, ("decoder",))}

    inputs, axes = _decoder_inputs(model)
    renamed, past = {}, []
    for layer in range(n_layers):
        for side, length, axis in (("decoder", _PAST, _PAST_AXIS), ("encoder", _source_length(model), _SOURCE_AXIS)):
            for part in ("key", "value"):
                name = f"past_key_values.{layer}.{side}.{part}"
                renamed[f"past_key_values.{len(past)}"] = name
                axes[name] = {0: _BATCH_AXIS, 2: axis}
                past.append(torch.zeros(_BATCH, n_heads, length, head_size, dtype=model.dtype))
    return _sample(forward, inputs | {"past_key_values": past}, axes, renamed=renamed)


def _cache_sizes(config) -> tuple[int, int, int]:
    """Layers, heads and head size of the decoder."""
    n_layers = getattr(config, "decoder_layers", None) or config.num_decoder_layers
    n_heads = getattr(config, "decoder_attention_heads", None) or config.num_attention_heads
    return n_layers, n_heads, getattr(config, "d_kv", None) or config.d_model // n_heads


def _decoder_inputs(model: torch.nn.Module) -> tuple[dict, dict]:
    inputs, axes = {}, {"input_ids": {0: _BATCH_AXIS, 1: _TARGET_AXIS}}
    if _takes_text(model):
        inputs["encoder_attention_mask"] = torch.ones(_BATCH, _SOURCE, dtype=torch.long)
        axes["encoder_attention_mask"] = _TEXT_AXES
    inputs["input_ids"] = torch.ones(_BATCH, _TARGET, dtype=torch.long)
    return inputs, axes


def _mask(encoder_attention_mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return {} if encoder_attention_mask is None else {"attention_mask": encoder_attention_mask}


def _present(cache, sides: Iterable[str]) -> dict[str, torch.Tensor]:
    halves = {"decoder": cache.self_attention_cache, "encoder": cache.cross_attention_cache}
    found = {}
    for layer in range(len(cache.self_attention_cache.layers)):
        for side in sides:
            found[f"present.{layer}.{side}.key"] = halves[side].layers[layer].keys
            found[f"present.{layer}.{side}.value"] = halves[side].layers[layer].values
    return found


def _sample(forward: Callable, inputs: dict, axes: dict, *, renamed: dict | None = None) -> Sample:
    """A sample whose dynamic shapes are the named axes: `axes` by final name, those of a list in its order."""
    dims = {label: torch.export.Dim(label, max=2**20) for labels in axes.values() for label in labels.values()}
    names = {final: given for given, final in (renamed or {}).items()}
    shapes: dict = {}
    for name, labels in axes.items():
        shape = {axis: dims[label] for axis, label in labels.items()}
        if name in names:
            shapes.setdefault(names[name].rpartition(".")[0], []).append(shape)
        else:
            shapes[name] = shape
    return Sample(inputs, {name: shapes[name] for name in inputs}, renamed or {}, axes, forward)
