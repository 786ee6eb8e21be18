"""`run`: try an export on a text, an image or a sound."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_export.answers import (
    answer_span,
    class_answer,
    class_shares,
    ctc_tokens,
    depth_answer,
    likeliest_tokens,
    token_classes,
)
from lora_export.artifact import Manifest
from lora_export.base.tasks import SEQ2SEQ, Task
from lora_export.check.inputs.audio import read_features, read_samples
from lora_export.check.inputs.batcher import Batcher
from lora_export.check.inputs.examples import Batch, Example
from lora_export.check.inputs.tokenizers import load_tokenizer
from lora_export.contract import has_own_head
from lora_export.errors import InputRefused, UsageProblem, some_of
from lora_export.named import no_such
from lora_export.reading import CONFIG, is_file, model_settings, read_json
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.generate import Generated, Piece
from lora_export.runtime.scheduler import Finish
from lora_export.runtime.seq2seq_session import Seq2SeqSession, open_export
from lora_export.sentence import SENTENCE_EMBEDDING


def run_trial(
    folder: Path,
    inputs: Sequence[str],
    blend: Mapping[str, float],
    *,
    provider: str | None,
    max_new_tokens: int,
    is_raw: bool = False,
    of_pairs: bool = False,
    stream: Callable[[str], None] | None = None,
) -> dict:
    """Run the export on `inputs` (texts, image files, or sound files) with a blend of adapters (none: the base).

    Args:
        of_pairs: The inputs are pairs of texts, one after the other.
        is_raw: Give a decoder the text as it is, also where the export has a chat template.
        stream: Called with each piece of a decoder's first text as it is written, and first with a raw prompt.

    Raises:
        LoraExportError: The export, an adapter or an input cannot be used.
    """
    session = open_export(folder, provider)
    manifest = session.manifest
    task = Task(manifest.task)
    adapters = blend or None
    place = session.preprocessing(adapters)
    head = {"task": manifest.task, "adapter": dict(blend), "provider": session.provider, "inputs": list(inputs)}
    if not blend and not has_own_head(manifest.adapter_inputs):
        names = some_of([each.name for each in manifest.adapters], 8)
        what = "The base has no head of its own, so it answers with an adapter only"
        raise UsageProblem(what, next_step=f"name one with --adapter: {names}")
    if of_pairs and task is not Task.TEXT_CLASSIFICATION:
        raise UsageProblem(
            "--pairs is for classifiers of texts",
            expected=str(Task.TEXT_CLASSIFICATION),
            found=manifest.task,
            next_step="leave it out",
        )
    if task in SEQ2SEQ:
        return head | {
            "results": _write_targets(session, place, inputs, adapters=adapters, max_new_tokens=max_new_tokens)
        }
    if task is Task.TEXT_GENERATION:
        return head | _write(session, inputs, adapters, max_new_tokens=max_new_tokens, is_raw=is_raw, stream=stream)
    how = {"pad_token_id": manifest.pad_token_id, "n_tokens": _longest(folder)}
    batcher = Batcher(place, task, manifest.contract, **how)
    if {"input_ids", "pixel_values"} <= {spec.name for spec in manifest.contract.inputs}:
        raise UsageProblem(
            "`run` takes texts or images, and this graph takes both",
            where=str(folder),
            next_step="run it from Python with AdapterSession",
        )
    answers = _Answers(session, batcher, place, adapters, _labels(manifest, blend))
    if task is Task.QUESTION_ANSWERING:
        return head | answers.to_questions(inputs)
    if task is Task.MULTIPLE_CHOICE:
        return head | answers.of_choices(inputs)
    if of_pairs:
        return head | answers.of_pairs(task, inputs)
    return head | {"results": answers.one_by_one(task, inputs)}


@dataclass(frozen=True)
class _Answers:
    """What an export without a cache says.

    Attributes:
        place: The folder with the tokenizer or processor.
        labels: The names of the classes, where the adapter has some.
    """

    session: AdapterSession
    batcher: Batcher
    place: Path
    adapters: Mapping[str, float] | None
    labels: Mapping[int, str]

    def one_by_one(self, task: Task, inputs: Sequence[str]) -> list[dict]:
        """An answer for each text, image or sound."""
        if self.batcher.takes_images and (missing := [name for name in inputs if not is_file(Path(name))]):
            raise no_such("image file", missing[0])
        if self.batcher.takes_sounds:  # sounds of different lengths are no batch
            return [
                self._answer(task, self._run(_sound(self.place, name, self.session)), None, row=0) for name in inputs
            ]
        batch = self.batcher.batch([Example(text) for text in inputs])
        outputs = self._run(batch.inputs)
        return [self._answer(task, outputs, batch, row=row) for row in range(len(inputs))]

    def of_pairs(self, task: Task, inputs: Sequence[str]) -> dict:
        """An answer for each text and the one that follows it."""
        if len(inputs) % 2:
            raise UsageProblem(
                "--pairs takes texts two and two", expected="run OUT --pairs TEXT TEXT [TEXT TEXT …]",
                found=f"{len(inputs)} texts",
            )  # fmt: skip
        firsts, seconds = inputs[::2], inputs[1::2]
        batch = self.batcher.batch([Example(a, None, b) for a, b in zip(firsts, seconds, strict=True)])
        outputs = self._run(batch.inputs)
        shown = [f"{a} / {b}" for a, b in zip(firsts, seconds, strict=True)]
        return {"inputs": shown, "results": [self._answer(task, outputs, batch, row=i) for i in range(len(firsts))]}

    def _run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.session.run(inputs, self.adapters)

    def _answer(self, task: Task, outputs: Mapping[str, np.ndarray], batch: Batch | None, *, row: int) -> dict:
        if "predicted_depth" in outputs:
            return depth_answer(outputs["predicted_depth"][row])
        if SENTENCE_EMBEDDING in outputs:
            return {SENTENCE_EMBEDDING: outputs[SENTENCE_EMBEDDING][row].tolist()}
        if "logits" not in outputs:
            states = outputs["last_hidden_state"][row]
            return {"last_hidden_state": list(states.shape), "mean": states.mean(axis=0)[:8].tolist()}
        logits = outputs["logits"][row]
        if task is Task.SEMANTIC_SEGMENTATION:
            return class_shares(logits, self.labels)
        if task is Task.CTC:
            return self._transcript(logits)
        if task is Task.FILL_MASK:
            return self._words(logits, batch.inputs["input_ids"][row])
        if logits.ndim == 1:
            return class_answer(logits, self.labels, _config(self.place, self.session).get("problem_type"))
        return token_classes(logits[batch.real[row]], self.labels)

    def _transcript(self, logits: np.ndarray) -> dict:
        tokens = ctc_tokens(logits, _config(self.place, self.session).get("pad_token_id") or 0)
        try:
            return {"text": "".join(load_tokenizer(self.place).convert_ids_to_tokens(tokens)).replace("|", " ")}
        except InputRefused:  # without a tokenizer, its tokens
            return {"text": " ".join(map(str, tokens)), "tokens": tokens}

    def _words(self, logits: np.ndarray, ids: np.ndarray) -> dict:
        tokenizer = self.batcher.tokenizer
        gaps = np.flatnonzero(ids == tokenizer.mask_token_id) if tokenizer.mask_token_id is not None else []
        if not len(gaps):
            raise UsageProblem(
                "The text has no gap to fill",
                expected=f"{tokenizer.mask_token} in it" if tokenizer.mask_token else "a tokenizer with a mask token",
                found=tokenizer.decode(ids, skip_special_tokens=True)[:80],
            )
        words = {tokenizer.decode([token]).strip(): score for token, score in likeliest_tokens(logits[gaps[0]])}
        return {"label": next(iter(words)), "scores": words}

    def to_questions(self, inputs: Sequence[str]) -> dict:
        """An answer for each question, which is followed by the text that holds it."""
        if len(inputs) % 2:
            raise UsageProblem(
                "Question answering takes questions and texts in turn",
                expected="run OUT QUESTION TEXT [QUESTION TEXT …]",
                found=f"{len(inputs)} texts",
            )
        questions, texts = inputs[::2], inputs[1::2]
        batch, tokenizer = self.batcher.pairs(questions, texts), self.batcher.tokenizer
        outputs, results = self._run(batch.inputs), []
        for row, question in enumerate(questions):
            first = min(len(tokenizer(question)["input_ids"]), batch.real[row].sum() - 1)
            place = answer_span(
                outputs["start_logits"][row],
                outputs["end_logits"][row],
                int(first),
                last=int(batch.real[row].sum()) - 1,
            )
            tokens = batch.inputs["input_ids"][row][place[0] : place[1] + 1]
            results.append({"text": tokenizer.decode(tokens, skip_special_tokens=True).strip(), "score": place[2]})
        return {"inputs": list(questions), "results": results}

    def of_choices(self, inputs: Sequence[str]) -> dict:
        """The likeliest ending of a text, which its endings follow."""
        if len(inputs) < 3:
            raise UsageProblem(
                "Multiple choice takes a text and its endings",
                expected="run OUT TEXT ENDING ENDING …",
                found=f"{len(inputs)} texts",
            )
        endings = dict(enumerate(inputs[1:]))
        logits = self._run(self.batcher.choices([(inputs[0], inputs[1:])]).inputs)["logits"][0]
        return {"inputs": [inputs[0]], "results": [class_answer(logits, endings)]}


def _longest(folder: Path) -> int:
    """The most tokens that the export's model has positions for; a tokenizer may be made for fewer."""
    config = model_settings(folder)
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    # RoBERTa's kin count positions from beyond the padding token's id.
    pad = config.get("pad_token_id")
    is_known = isinstance(positions, int) and positions > 0
    return max(1, positions - (pad if isinstance(pad, int) else 0) - 1) if is_known else 2**20


def _sound(folder: Path, name: str, session: AdapterSession) -> dict[str, np.ndarray]:
    spec = session.manifest.contract.inputs[0]
    return {spec.name: read_samples(folder, name).astype(spec.dtype)}


def _config(place: Path, session: AdapterSession) -> dict:
    """The `config.json` of the adapter, or else of the export."""
    files = [folder / CONFIG for folder in (place, session.folder)]
    return next((read_json(file) for file in files if file.is_file()), {})


def _write(
    session: AdapterSession,
    texts: Sequence[str],
    adapters: Mapping[str, float] | None,
    *,
    max_new_tokens: int,
    is_raw: bool,
    stream: Callable[[str], None] | None,
) -> dict:
    """What a decoder writes, each text as a chat's first message where there is a chat template."""
    is_chat = session.tokenizer(adapters).chat_template is not None and not is_raw
    prompts = [[{"role": "user", "content": text}] if is_chat else text for text in texts]

    def show(piece: Piece) -> None:
        if piece.index == 0:
            stream(piece.text)

    if stream is not None and not is_chat:
        stream(texts[0])
    each_piece = None if stream is None else show
    found = session.generate(prompts, adapters, max_new_tokens=max_new_tokens, stream=each_piece)
    return {"chat": is_chat, "results": [_written(each, is_chat) for each in found]}


def _written(found: Generated, is_chat: bool) -> dict:
    if found.finish is Finish.FAILED:
        raise InputRefused(
            "The scores of a token are not finite, so no token is the likeliest",
            next_step="run `lora-export check`; a float16 export may overflow where a float32 one does not",
        )
    fields = {"continuation": found.text, "tokens": list(found.ids), "finish": str(found.finish)}
    if found.text.strip():
        return fields
    if found.ids:
        why = f"its {len(found.ids)} tokens are special tokens or spaces; more may follow with --max-new-tokens"
    elif is_chat:
        why = "the first token ends it; --raw gives the model the text without the chat template"
    else:
        why = "the first token ends it: to the model, the text is complete"
    return fields | {"empty_because": why}


def _write_targets(
    session: Seq2SeqSession, folder: Path, inputs: Sequence[str], *, adapters, max_new_tokens: int
) -> list[dict]:
    tokenizer = load_tokenizer(folder)
    if session.manifest.task == Task.SPEECH_RECOGNITION:
        sources = {"input_features": read_features(folder, inputs, session.manifest)}
    else:
        encoded = tokenizer(list(inputs), return_tensors="np", padding=True)
        sources = {name: np.asarray(encoded[name], np.int64) for name in ("input_ids", "attention_mask")}
    found = session.generate(sources, adapters, max_new_tokens=max_new_tokens)
    return [{"text": tokenizer.decode(tokens, skip_special_tokens=True), "tokens": tokens} for tokens in found]


def _labels(manifest: Manifest, blend: Mapping[str, float]) -> dict[int, str]:
    named = [record.labels for record in manifest.adapters if record.labels and (not blend or record.name in blend)]
    return named[0] if len(named) == 1 else {}
