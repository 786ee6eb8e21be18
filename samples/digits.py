"""Train a tiny vision transformer on scikit-learn's digits, and a LoRA adapter that tells odd from even."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import Build, out_folder, print_table, progress, read_json, write_json

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn
    from transformers import ViTForImageClassification

PIXELS = 32
BATCH = 64
BASE_STEPS = 500
ADAPTER_STEPS = 200
SAVED_IMAGES = 12
SEED = 5
DIGITS = tuple(str(digit) for digit in range(10))
PARITIES = ("even", "odd")
PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"height": PIXELS, "width": PIXELS},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


@dataclass(frozen=True)
class Part:
    """Images, what the model is given for them, and which digit each shows."""

    images: tuple[Image, ...]
    pixels: Tensor
    digits: Tensor


def main() -> None:
    """Build what is missing or stale, then print how good base and adapter are."""
    build = Build(
        name="digits",
        out=out_folder(__doc__ or ""),
        outputs=("vit-digits", "image-adapters/parity", "heldout/digits", "digits.json"),
        sources=("digits.py", "training.py", "common.py"),
        packages=("torch", "transformers", "peft", "scikit-learn", "pillow"),
    )
    if not build.is_current():
        build.run(lambda fresh: make(fresh, build.out))
    show(read_json(build.out / "digits.json"))


def make(fresh: Path, out: Path) -> None:
    """Write base, adapter, some held-out images and results to `fresh`, which becomes `out`."""
    import training

    training.prepare(SEED)
    base, adapter = fresh / "vit-digits", fresh / "image-adapters" / "parity"
    write_json(base / "preprocessor_config.json", PREPROCESSOR)
    train, heldout = load(base)
    sizes = {"n_train": len(train.images), "n_heldout": len(heldout.images)}
    results = {
        "base": {**sizes, **train_base(train, heldout, base)},
        "adapters": {"parity": {**sizes, **train_adapter(train, heldout, base, adapter, out / base.name)}},
    }
    save_images(heldout, fresh / "heldout" / "digits")
    write_json(fresh / "digits.json", results)


def load(base: Path) -> tuple[Part, Part]:
    """The digits to learn from and those held out, prepared by the processor saved in `base`."""
    import torch
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from transformers import AutoImageProcessor

    data = load_digits()
    processor = AutoImageProcessor.from_pretrained(base)

    def part(rows: Sequence[int]) -> Part:
        # Grey levels go from 0 to 16; what is learned from is what a saved PNG would give.
        grey = [(data.images[row] * 255 / 16).astype("uint8") for row in rows]
        images = [Image.fromarray(pixels).resize((PIXELS, PIXELS)).convert("RGB") for pixels in grey]
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        return Part(tuple(images), pixels, torch.tensor(data.target[rows]))

    learn, test = train_test_split(range(len(data.target)), test_size=0.2, random_state=SEED, stratify=data.target)
    return part(learn), part(test)


def train_base(train: Part, heldout: Part, folder: Path) -> dict[str, Any]:
    """Train the base on the ten digits and save it; returns what digits.json says of it."""
    import training
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=PIXELS,
        patch_size=8,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        **labels_of(DIGITS),
    )
    model = ViTForImageClassification(config)
    progress(f"base: {model.num_parameters():,} parameters, {len(train.images):,} images")
    started = time.monotonic()
    training.fit(model, batches(train.pixels, train.digits, BASE_STEPS), training.adamw(model, 2e-3, 2e-3))
    seconds = time.monotonic() - started
    model.save_pretrained(folder)
    saved = ViTForImageClassification.from_pretrained(folder).eval()
    return {
        "classes": list(DIGITS),
        "parameters": model.num_parameters(),
        "accuracy_pytorch": measure(saved, heldout.pixels, heldout.digits),
        "seconds": round(seconds, 1),
    }


def train_adapter(train: Part, heldout: Part, base: Path, folder: Path, final_base: Path) -> dict[str, Any]:
    """Train the adapter with a head of its own and save it; returns what digits.json says of it.

    The saved adapter names `final_base` as its base: where `base` will be moved to.
    """
    import training
    from peft import LoraConfig, PeftModel, get_peft_model

    options = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["classifier"],
    )
    progress("parity")
    training.prepare(SEED)
    model = get_peft_model(with_head_for_parity(base), options)
    started = time.monotonic()
    training.fit(model, batches(train.pixels, train.digits % 2, ADAPTER_STEPS), training.adamw(model, 5e-3, 5e-3))
    seconds = time.monotonic() - started
    model.peft_config["default"].base_model_name_or_path = str(final_base)
    model.save_pretrained(folder, save_embedding_layers=False)
    config = model.get_base_model().config.to_dict() | {"_name_or_path": str(final_base)}
    write_json(folder / "config.json", config | {"num_labels": len(PARITIES)})
    saved = PeftModel.from_pretrained(with_head_for_parity(base), folder).eval()
    return {
        "classes": list(PARITIES),
        "rank": 4,
        "alpha": 8,
        "accuracy_pytorch": measure(saved, heldout.pixels, heldout.digits % 2),
        "seconds": round(seconds, 1),
    }


def with_head_for_parity(base: Path) -> ViTForImageClassification:
    """The base with an untrained head of two classes in place of its own."""
    from transformers import ViTForImageClassification

    return ViTForImageClassification.from_pretrained(base, ignore_mismatched_sizes=True, **labels_of(PARITIES))


def labels_of(names: Sequence[str]) -> dict[str, Any]:
    """The configuration fields that give classes their names."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


def batches(pixels: Tensor, labels: Tensor, steps: int) -> list[dict[str, Tensor]]:
    """Random batches of images with their labels."""
    shuffler = random.Random(SEED)
    chosen = [shuffler.sample(range(len(labels)), BATCH) for _ in range(steps)]
    return [{"pixel_values": pixels[rows], "labels": labels[rows]} for rows in chosen]


def measure(model: nn.Module, pixels: Tensor, expected: Tensor) -> float:
    """The accuracy, 0 to 1, on the given images."""
    import torch
    import training

    with torch.inference_mode():
        return training.accuracy(model(pixel_values=pixels).logits.argmax(-1), expected)


def save_images(part: Part, folder: Path) -> None:
    """Write a few images as PNG, named by index and digit."""
    folder.mkdir(parents=True)
    for index, (image, digit) in enumerate(zip(part.images[:SAVED_IMAGES], part.digits.tolist(), strict=False)):
        image.save(folder / f"{index}-{digit}.png")


def show(results: dict[str, Any]) -> None:
    """Print one line for the base and one for the adapter."""
    named = {"base": results["base"], **results["adapters"]}
    header = ("model", "classes", "train", "held-out", "accuracy", "seconds")
    rows = []
    for name, result in named.items():
        counts = (len(result["classes"]), result["n_train"], result["n_heldout"])
        rows.append((name, *map(str, counts), f"{result['accuracy_pytorch']:.1%}", f"{result['seconds']:.0f}"))
    print_table(header, rows)


if __name__ == "__main__":
    main()
