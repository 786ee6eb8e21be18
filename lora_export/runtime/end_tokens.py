"""Which tokens end the texts of an adapter, or of the base. NumPy only, but for tokenizers that must be opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lora_export.artifact import Manifest
from lora_export.runtime.generation_config import eos_ids_of, generation_defaults
from lora_export.runtime.tokenizer import TextTokenizer, has_fast_tokenizer


def end_tokens_in(
    place: Path, export: Path, *, is_brought: bool, tokenizer: Callable[[], TextTokenizer]
) -> frozenset[int]:
    """The tokens that end texts written with the settings in `place`, a folder of `export`.

    1. Those of the configurations: of `place`, and of the export where that has none. `generate` of Transformers goes
       by them alone.
    2. The tokenizer's `eos_token` where an adapter brought its own settings: a trainer that gives a chat another end
       writes it there, and PEFT saves no generation settings.
    3. The same where no configuration names any.

    Args:
        is_brought: Whether an adapter brought them.
        tokenizer: Opens the tokenizer of `place`.
    """
    found = eos_ids_of(generation_defaults(*dict.fromkeys([place, export])))
    if (found and not is_brought) or not has_fast_tokenizer(place, export):
        return found
    eos = tokenizer().eos_id
    return found if eos is None else found | {eos}


def has_brought_settings(place: Path, export: Path, manifest: Manifest) -> bool:
    """Whether an adapter of `manifest`, which is that of `export` itself, brought the settings in `place`."""
    return place != export or has_adapter_settings(manifest)


def has_adapter_settings(manifest: Manifest) -> bool:
    """Whether the settings in the export's own folder are an adapter's, in the place of the base's."""
    return any(record.preprocessing == "." for record in manifest.adapters)
