"""Routes whose answers are about the tokens of a text: the classes of each, an answer in a text, words in a gap."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from lora_export.answers import answer_span, class_name, class_values
from lora_export.serve.batching import Gaps
from lora_export.serve.encoders import Answer
from lora_export.serve.models import Target
from lora_export.serve.problems import Problem
from lora_export.serve.schema import ClassifyBody, GapsBody, QuestionBody
from lora_export.serve.service import Service, usage_of
from lora_export.serve.tasks import GAPS, QUESTIONS

if TYPE_CHECKING:
    from tokenizers import Encoding


def add_tokens(api: FastAPI, service: Service) -> None:
    """The routes of question answering and of masked language models."""

    @api.post("/v1/question-answering", tags=["encoders"])
    async def answer(body: QuestionBody, request: Request) -> Response:
        """The part of `context` that answers `question`."""
        target = service.target(body, request, QUESTIONS)
        if not body.question or not body.context:
            field = "context" if body.question else "question"
            raise Problem(400, "The question or its text is empty", param=field, code="empty")
        (encoding,) = await service.encodings([(body.question, body.context)], target, "context")
        rows, types = [encoding.ids], [encoding.type_ids]
        (found,) = await service.answers(request, target, rows, types=types)
        span = await asyncio.to_thread(_span, found, encoding, body.context)
        return JSONResponse({"model": body.model, **span, "usage": usage_of(rows)})

    @api.post("/v1/fill-mask", tags=["encoders"])
    async def fill(body: GapsBody, request: Request) -> Response:
        """The likeliest tokens in each gap of each input."""
        target = service.target(body, request, GAPS)
        texts = service.listed(body.input, "input")
        encodings = await service.encodings(texts, target, "input")
        gaps = [Gaps(_gaps(encoding, target, service), body.top_k) for encoding in encodings]
        service.require_room(sum(len(each.places) for each in gaps), "input", what="gaps")
        rows = [encoding.ids for encoding in encodings]
        found: list[Answer] = await service.answers(request, target, rows, gaps=gaps)
        decode = target.settings.texts.tokenizer.decode

        def written() -> Response:
            data = [
                {"index": index, "gaps": _candidates(*each, decode=decode)}
                for index, each in enumerate(zip(found, encodings, gaps, strict=True))
            ]
            return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": usage_of(rows)})

        return await asyncio.to_thread(written)  # it may have 100 words for each gap


async def classes_of_tokens(body: ClassifyBody, request: Request, *, service: Service, target: Target) -> Response:
    """The likeliest class of every token of every input, its probability, and the characters that the token is of."""
    given = service.listed(body.input, "input")
    encodings: Sequence[Encoding | None] = [None] * len(given)
    if isinstance(given[0], str):
        encodings = await service.encodings(given, target, "input")
        rows = [encoding.ids for encoding in encodings]
    else:
        rows = await service.rows(given, target)
    found: list[Answer] = await service.answers(request, target, rows)

    def written() -> Response:
        data = [
            {"index": index, "tokens": _tagged(answer, encoding, text), "num_classes": answer.values.shape[1],
             "labels": [class_name(target.labels, n) for n in range(answer.values.shape[1])]}
            for index, (answer, encoding, text) in enumerate(zip(found, encodings, given, strict=True))
        ]  # fmt: skip
        return JSONResponse(
            {
                "id": f"classify-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()),
                "model": body.model, "data": data, "usage": usage_of(rows),
            }
        )  # fmt: skip

    return await asyncio.to_thread(written)  # it has an entry for each token of a request


def _tagged(answer: Answer, encoding: Encoding | None, text: str | Sequence[int]) -> list[dict]:
    """A dict for each token, those that the tokenizer puts around the text left out; of token ids, for each of them."""
    labels, found = answer.target.labels, []
    for place, scores in enumerate(answer.values):
        if encoding is not None and encoding.special_tokens_mask[place]:
            continue
        best = int(scores.argmax())
        score = float(class_values(scores)[best] if len(scores) > 1 else scores[0])
        entry = {"label": class_name(labels, best), "score": score}
        if encoding is not None:
            start, end = encoding.offsets[place]
            entry |= {"start": start, "end": end, "text": text[start:end], "word": encoding.word_ids[place]}
        found.append(entry)
    return found


def _candidates(answer: Answer, encoding: Encoding, gaps: Gaps, *, decode: Callable) -> list[dict]:
    """A dict for each gap of a text: where it lies, and the likeliest tokens in its place."""
    return [
        {"start": encoding.offsets[place][0], "end": encoding.offsets[place][1], "candidates": [
            {"token": int(token), "text": decode([int(token)], skip_special_tokens=False), "score": float(score)}
            for token, score in zip(tokens, scores, strict=True)
        ]}
        for place, tokens, scores in zip(gaps.places, answer.tokens, answer.values, strict=True)
    ]  # fmt: skip


def _span(answer: Answer, encoding: Encoding, context: str) -> dict:
    """The likeliest part of the context, where it lies, and its probability among all parts."""
    places = np.flatnonzero(np.array([number == 1 for number in encoding.sequence_ids]))
    if not len(places):
        raise Problem(400, "The context has no tokens", param="context", code="empty")
    starts, ends = answer.values[:, 0], answer.values[:, 1]
    first, last, score = answer_span(starts, ends, int(places[0]), last=int(places[-1]))
    start, end = encoding.offsets[first][0], encoding.offsets[last][1]
    return {"answer": context[start:end], "score": score, "start": start, "end": end}


def _gaps(encoding: Encoding, target: Target, service: Service) -> list[int]:
    mask = target.settings.texts.mask
    places = [] if mask is None else [place for place, token in enumerate(encoding.ids) if token == mask[1]]
    if not places:
        said = "the tokenizer has no mask token" if mask is None else f"write {mask[0]} where a word is missing"
        raise Problem(400, f"An input has no gap to fill: {said}", param="input", code="no_gap")
    return places
