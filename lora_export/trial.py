"""`run`: try an export on a text, an image or a sound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lora_export.artifact import Manifest
from lora_export.base.tasks import SEQ2SEQ, Task
from lora_export.check.inputs.audio import read_features
from lora_export.check.inputs.examples import Batcher, Example
from lora_export.check.inputs.tokenizers import load_tokenizer
from lora_export.errors import InputRefused, UsageProblem
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.generate import generate
from lora_export.runtime.seq2seq_session import Seq2SeqSession, open_export


def run_trial(
    folder: Path, inputs: Sequence[str], blend: Mapping[str, float], provider: str | None, max_new_tokens: int
) -> dict:
    """Run the export on `inputs` (texts, image files, or sound files) with a blend of adapters (none: the base).

    Raises:
        LoraExportError: The export, an adapter or an input cannot be used.
    """
    session = open_export(folder, provider)
    manifest = session.manifest
    task = Task(manifest.task)
    adapters = blend or None
    place = _preprocessing_of(manifest, folder, blend)
    head = {"task": manifest.task, "adapter": dict(blend), "provider": session.provider, "inputs": list(inputs)}
    if task in SEQ2SEQ:
        return head | {"results": _write_targets(session, place, inputs, adapters, max_new_tokens)}
    if task is Task.TEXT_GENERATION:
        return head | {"results": _generate(session, place, inputs, adapters, max_new_tokens)}
    batcher = Batcher(place, task, manifest.contract, pad_token_id=manifest.pad_token_id)
    missing = [name for name in inputs if batcher.takes_images and not Path(name).is_file()]
    if missing:
        raise InputRefused("There is no such image file", where=missing[0])
    if {"input_ids", "pixel_values"} <= {spec.name for spec in manifest.contract.inputs}:
        raise UsageProblem(
            "`run` takes texts or images, and this graph takes both",
            where=str(folder),
            next_step="run it from Python with AdapterSession",
        )
    batch = batcher.batch([Example(text) for text in inputs])
    outputs = session.run(batch.inputs, adapters)
    labels = _labels(manifest, blend)
    results = []
    for row in range(len(inputs)):
        if "logits" in outputs and outputs["logits"].ndim == 2:
            results.append(_scores(outputs["logits"][row], labels))
        elif "logits" in outputs:
            best = outputs["logits"][row][batch.real[row]].argmax(axis=-1)
            results.append({"labels": [labels.get(int(i), f"LABEL_{i}") for i in best]})
        else:
            states = outputs["last_hidden_state"][row]
            results.append({"last_hidden_state": list(states.shape), "mean": states.mean(axis=0)[:8].tolist()})
    return head | {"results": results}


def _generate(
    session: AdapterSession, folder: Path, inputs: Sequence[str], adapters, max_new_tokens: int
) -> list[dict]:
    tokenizer = load_tokenizer(folder)
    prompts = [tokenizer(text)["input_ids"] for text in inputs]
    # A tokenizer that ends every text would end the prompt, too.
    prompts = [p[:-1] if len(p) > 1 and p[-1] == tokenizer.eos_token_id else p for p in prompts]
    eos = frozenset() if tokenizer.eos_token_id is None else frozenset({tokenizer.eos_token_id})
    found = generate(session, prompts, adapters, max_new_tokens=max_new_tokens, eos_ids=eos)
    return [{"continuation": tokenizer.decode(tokens), "tokens": tokens} for tokens in found]


def _write_targets(
    session: Seq2SeqSession, folder: Path, inputs: Sequence[str], adapters, max_new_tokens: int
) -> list[dict]:
    tokenizer = load_tokenizer(folder)
    if session.manifest.task == Task.SPEECH_RECOGNITION:
        sources = {"input_features": read_features(folder, inputs, session.manifest)}
    else:
        encoded = tokenizer(list(inputs), return_tensors="np", padding=True)
        sources = {name: np.asarray(encoded[name], np.int64) for name in ("input_ids", "attention_mask")}
    found = session.generate(sources, adapters, max_new_tokens=max_new_tokens)
    return [{"text": tokenizer.decode(tokens, skip_special_tokens=True), "tokens": tokens} for tokens in found]


def _preprocessing_of(manifest: Manifest, folder: Path, blend: Mapping[str, float]) -> Path:
    """Where the tokenizer or processor lies: of one adapter its own, of a blend or the base the export's."""
    own = {record.name: record.preprocessing for record in manifest.adapters}
    place = own.get(next(iter(blend))) if len(blend) == 1 else None
    return folder if place is None else folder / place


def _labels(manifest: Manifest, blend: Mapping[str, float]) -> dict[int, str]:
    named = [record.labels for record in manifest.adapters if record.labels and (not blend or record.name in blend)]
    return named[0] if len(named) == 1 else {}


def _scores(logits: np.ndarray, labels: Mapping[int, str]) -> dict:
    shifted = np.exp(logits.astype(np.float64) - logits.max())
    scores = shifted / shifted.sum()
    order = np.argsort(-scores)
    named = {labels.get(int(i), f"LABEL_{i}"): float(scores[i]) for i in order}
    return {"label": next(iter(named)), "scores": named}
