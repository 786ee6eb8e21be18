"""What a model is asked with: tokenizer, processor and configuration of one folder, as they were when read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_export.artifact import MANIFEST, Manifest, read_manifest
from lora_export.reading import model_settings
from lora_export.runtime.images import ImageSteps, open_image_steps
from lora_export.runtime.sound import Samples, open_samples
from lora_export.serve.ctc_words import CtcWords
from lora_export.serve.tasks import CTC, IMAGES, OF_SIGNALS, WRITING
from lora_export.serve.texts import Texts, Voice, open_voice


@dataclass(frozen=True)
class Settings:
    """Those in one folder; None for what models of its task are not asked with.

    Attributes:
        place: The folder.
        texts: An encoder's tokenizer.
        signals: What images or sounds go through.
        words: What makes a text of frames' tokens.
        voice: The tokenizer and the settings of a model that writes.
        problem_type: The kind of classification: the folder's own, or else the base's.
    """

    place: Path
    texts: Texts | None = None
    signals: ImageSteps | Samples | None = None
    words: CtcWords | None = None
    voice: Voice | None = None
    problem_type: str | None = None


def open_settings(place: Path, folder: Path, manifest: Manifest) -> Settings:
    """What is in `place`, and else in the export that it lies in.

    Args:
        folder: That of the server's own export, which `manifest` is of: `place` may lie in another.

    Raises:
        InputRefused: Something is missing or damaged.
    """
    task, around = manifest.task, (place, *place.parents)
    export = next((each for each in around if (each / MANIFEST).is_file()), folder)
    if task in OF_SIGNALS:
        signals = (open_image_steps if task == IMAGES else open_samples)(place, export)
        words = CtcWords.of(place, export) if task == CTC else None
        return Settings(place, signals=signals, words=words, problem_type=_problem_type(place, folder))
    if task in WRITING:
        of_export = manifest if export == folder else read_manifest(export)
        return Settings(place, voice=open_voice(place, export, of_export, task=task))
    return Settings(place, texts=Texts(place, export), problem_type=_problem_type(place, folder))


def _problem_type(place: Path, folder: Path) -> str | None:
    return (model_settings(place) or model_settings(folder)).get("problem_type")
