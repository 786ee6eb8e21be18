"""What a model that is run in one pass is traced with: texts, images, both, or sounds.

texts            input_ids, attention_mask, token_type_ids where it has several types
multiple choice  the same, with an axis of choices after that of the batch
images           pixel_values, of the config's size, else of the image processor's
sounds           input_values: samples (Wav2Vec2), or spectrograms of a fixed length (AST)
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from lora_export.base.forward import is_dual_encoder, text_input_names
from lora_export.base.sample import Sample
from lora_export.base.tasks import Task
from lora_export.errors import InputRefused

# Different from each other and from usual model sizes, so that none is taken for another.
_BATCH, _SEQUENCE, _CHOICES, _IMAGES = 2, 7, 5, 3
# Some hundred frames of Wav2Vec2's convolutions.
_SAMPLES = 40_007


def encoder_sample(
    task: Task,
    model: torch.nn.Module,
    *,
    named: Collection[str] | None = None,
    image_size: tuple[int, int] | None = None,
) -> Sample:
    """The sample of a weightless model for one of the tasks without a cache.

    Args:
        named: The inputs that the base's tokenizer names; None for the usual ones.
        image_size: Height and width of what its image processor makes, for a model whose config does not say.

    Raises:
        InputRefused: Neither says how large its images are.
    """
    if is_dual_encoder(model):
        # One image may be compared with many texts, so their numbers are independent.
        texts = _text_sample(model, "text_batch_size", named)
        images = _image_sample(model, "image_batch_size", n_images=_IMAGES, size=image_size)
        return Sample(texts.inputs | images.inputs, texts.dynamic_shapes | images.dynamic_shapes, {})
    if task is Task.MULTIPLE_CHOICE:
        return _choices_sample(model, named)
    if model.main_input_name == "input_values":
        return _sound_sample(model)
    if task is Task.IMAGE_CLASSIFICATION or model.main_input_name == "pixel_values":
        return _image_sample(model, "batch_size", n_images=_BATCH, size=image_size)
    return _text_sample(model, "batch_size", named)


def _image_sample(model: torch.nn.Module, batch: str, *, n_images: int, size: tuple[int, int] | None) -> Sample:
    config = getattr(model.config, "vision_config", model.config)
    said = (getattr(part, "image_size", None) for part in (config, getattr(config, "backbone_config", None)))
    size = next(filter(None, said), size)
    if size is None:
        raise InputRefused(
            f"Nothing says how large the images of this {model.config.model_type} base are",
            where="config.json: image_size, and preprocessor_config.json: size",
            next_step="save the model's image processor into the base's folder: "
            "AutoImageProcessor.from_pretrained(…).save_pretrained(BASE)",
        )
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.zeros(n_images, getattr(config, "num_channels", 3), height, width, dtype=model.dtype)
    return Sample({"pixel_values": pixels}, {"pixel_values": {0: torch.export.Dim(batch, max=2**20)}}, {})


def _text_sample(model: torch.nn.Module, batch: str, named: Collection[str] | None) -> Sample:
    rows, sequence = torch.export.Dim(batch, max=2**20), _sequence_axis(model)
    tokens = torch.ones(_BATCH, _SEQUENCE, dtype=torch.long)
    inputs = {name: tokens.clone() for name in text_input_names(model, named)}
    shapes = {name: {0: rows, 1: sequence} for name in inputs}
    if getattr(model.config, "use_cache", None) is not None:
        inputs["use_cache"] = False
    return Sample(inputs, shapes, {})


def _choices_sample(model: torch.nn.Module, named: Collection[str] | None) -> Sample:
    labels = {0: "batch_size", 1: "num_choices", 2: "sequence_length"}
    axes = {0: torch.export.Dim(labels[0], max=2**20), 1: torch.export.Dim(labels[1], max=2**10)}
    axes[2] = _sequence_axis(model)
    tokens = torch.ones(_BATCH, _CHOICES, _SEQUENCE, dtype=torch.long)
    inputs = {name: tokens.clone() for name in text_input_names(model, named)}
    return Sample(inputs, dict.fromkeys(inputs, axes), {}, dict.fromkeys(inputs, labels))


def _sequence_axis(model: torch.nn.Module) -> torch.export.Dim:
    config = getattr(model.config, "text_config", model.config)
    longest = getattr(config, "max_position_embeddings", None) or 2**20
    return torch.export.Dim("sequence_length", max=_longest_sequence(model, longest))


def _longest_sequence(model: torch.nn.Module, positions: int) -> int:
    # RoBERTa counts positions from padding_idx + 1, so its table is longer than its longest sequence.
    offset = getattr(model.config, "pad_token_id", None)
    counts_from_padding = any(
        getattr(module, "padding_idx", None) is not None and name.endswith("position_embeddings")
        for name, module in model.named_modules()
    )
    return positions - offset - 1 if counts_from_padding and isinstance(offset, int) else positions


def _sound_sample(model: torch.nn.Module) -> Sample:
    config, batch = model.config, torch.export.Dim("batch_size", max=2**20)
    if hasattr(config, "conv_kernel"):
        samples = torch.export.Dim("num_samples", min=1000, max=2**24)
        sound = torch.zeros(_BATCH, _SAMPLES, dtype=model.dtype)
        labels = {"input_values": {0: "batch_size", 1: "num_samples"}}
        return Sample({"input_values": sound}, {"input_values": {0: batch, 1: samples}}, {}, labels)
    if hasattr(config, "max_length") and hasattr(config, "num_mel_bins"):
        sound = torch.zeros(_BATCH, config.max_length, config.num_mel_bins, dtype=model.dtype)
        return Sample({"input_values": sound}, {"input_values": {0: batch}}, {}, {"input_values": {0: "batch_size"}})
    raise InputRefused(
        f"How a {config.model_type} base takes sounds is not known here",
        where=f"config.json: model_type {config.model_type}",
        expected="samples through convolutions (conv_kernel), or spectrograms (num_mel_bins and max_length)",
        next_step="serve it with Transformers and PEFT",
    )
