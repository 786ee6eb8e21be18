"""`/v1/completions` and `/v1/chat/completions`: a body as wishes, and the pieces of texts as OpenAI's answers."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from lora_export.runtime.sampling import Sampling
from lora_export.serve.counting import Count
from lora_export.serve.events import EventStream
from lora_export.serve.models import Target
from lora_export.serve.pieces import Piece, Pieces
from lora_export.serve.problems import Problem
from lora_export.serve.schema import ChatBody, CompletionBody, WritingBody
from lora_export.serve.service import LONG_TEXT, Service
from lora_export.serve.tasks import GENERATION, TEXT2TEXT
from lora_export.serve.texts import Voice
from lora_export.serve.writing import Wish

# OpenAI's.
_TOKENS_OF_A_COMPLETION = 16
# Transformers' where a configuration samples and says no number.
_TOP_K = 50


def add_writing(api: FastAPI, service: Service) -> None:
    """The routes of decoders and of encoder-decoders that take texts."""

    @api.post("/v1/completions", tags=["texts"])
    async def completions(body: CompletionBody, request: Request) -> Response:
        """How each prompt goes on; of an encoder-decoder, what it makes of each prompt."""
        target = service.target(body, request, GENERATION, TEXT2TEXT)
        voice = target.settings.voice
        prompts = await _prompts(body.prompt, voice, service)
        how = {"longest": service.models.longest, "asked": body.max_tokens, "default": _TOKENS_OF_A_COMPLETION}
        make = _wish if service.models.task == GENERATION else _target_wish
        wishes = [make(body, ids, voice, **how) for ids in prompts]
        return await _written(service, request, target, wishes=wishes, form=Form.of_completions(body))

    @api.post("/v1/chat/completions", tags=["texts"])
    async def chat(body: ChatBody, request: Request) -> Response:
        """The assistant's answer, by the export's chat template."""
        target = service.target(body, request, GENERATION)
        voice = target.settings.voice
        messages = [{"role": message.role, "content": message.text} for message in body.messages]
        is_long = sum(len(message["content"]) for message in messages) > LONG_TEXT
        encode = voice.tokenizer.encode_chat
        ids = await asyncio.to_thread(encode, messages) if is_long else encode(messages)
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise Problem(400, "max_tokens is the older name of max_completion_tokens: give one", param="max_tokens")
        asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        wish = _wish(body, ids, voice, longest=service.models.longest, asked=asked, default=None)
        return await _written(service, request, target, wishes=[wish], form=Form.of_chat(body))


async def _prompts(given: str | list, voice: Voice, service: Service) -> list[list[int]]:
    given = service.listed(given, "prompt")
    if not isinstance(given[0], str):
        if service.models.task == TEXT2TEXT:
            service.require_tokens(given, "prompt")
        return [list(ids) for ids in given]

    def encode() -> list[list[int]]:
        is_source = service.models.task == TEXT2TEXT
        make = voice.tokenizer.encode_source if is_source else voice.tokenizer.encode
        return [make(text) for text in given]

    return await asyncio.to_thread(encode) if sum(map(len, given)) > LONG_TEXT else encode()


def _wish(
    body: WritingBody, ids: list[int], voice: Voice, *, longest: int, asked: int | None, default: int | None
) -> Wish:
    room = longest - len(ids)
    if room < 1 or (asked or 0) > room:
        wanted = f" and {asked} new ones" if asked else ""
        raise Problem(
            400,
            f"The prompt has {len(ids)} tokens{wanted}; a text has at most {longest}",
            code="context_length_exceeded",
        )
    return _wish_for(body, ids, voice, most=asked or min(default or room, room))


def _target_wish(
    body: WritingBody, ids: list[int], voice: Voice, *, longest: int, asked: int | None, default: int
) -> Wish:
    """Of an encoder-decoder, whose source and target are as long as a text may be, each by itself."""
    room = longest - len(voice.rules.start)
    if len(ids) > longest or (asked or 0) > room:
        too_long = f"The prompt has {len(ids)} tokens" if len(ids) > longest else f"{asked} new tokens are asked for"
        most = longest if len(ids) > longest else room
        raise Problem(400, f"{too_long}; there is room for {most}", code="context_length_exceeded")
    wish = _wish_for(body, ids, voice, most=asked or min(default, room))
    return replace(wish, source={"input_ids": np.array(ids, np.int64)}, rules=voice.rules)


def _wish_for(body: WritingBody, ids: list[int], voice: Voice, *, most: int) -> Wish:
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    ends = frozenset() if body.ignore_eos else voice.eos_ids
    return Wish(ids, sampling_of(body, voice.defaults), most, ends, stop)


def sampling_of(body: WritingBody, defaults: Mapping[str, object]) -> Sampling:
    """How a request's tokens are chosen.

    1. A field that is given holds.
    2. The others are the configuration's, where it samples, and Transformers' where that says no number.
    3. Where it does not sample: greedy, unless the request asks for `top_p`, `top_k` or a seed, which mean nothing
       without a temperature: 1 then, as in OpenAI's API.
    """
    samples = bool(defaults.get("do_sample"))
    asks = any(value is not None for value in (body.top_p, body.top_k, body.seed))
    own = {"temperature": 1.0, "top_k": _TOP_K, "top_p": 1.0} | {
        name: defaults[name] for name in ("temperature", "top_k", "top_p") if defaults.get(name) is not None
    }
    if not samples:
        own = {"temperature": 1.0 if asks else 0.0, "top_k": 0, "top_p": 1.0}
    own["repetition_penalty"] = defaults.get("repetition_penalty") or 1.0
    given = {name: getattr(body, name) for name in (*own, "seed")}
    return Sampling(**own | {name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class Form:
    """How OpenAI's API writes texts: of completions or of a chat.

    Attributes:
        choice: A whole text's choice, by its text.
        delta: A piece's choice, by its text.
    """

    body: WritingBody
    prefix: str
    object: str
    object_of_chunks: str
    choice: Callable[[str], dict]
    delta: Callable[[str], dict]
    starts: bool
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def of_completions(cls, body: WritingBody) -> Form:
        def text(value: str) -> dict:
            return {"text": value}

        return cls(body, "cmpl", "text_completion", "text_completion", text, text, starts=False)

    @classmethod
    def of_chat(cls, body: WritingBody) -> Form:
        def message(value: str) -> dict:
            return {"message": {"role": "assistant", "content": value}}

        def delta(value: str) -> dict:
            return {"delta": {"content": value} if value else {}}

        return cls(body, "chatcmpl", "chat.completion", "chat.completion.chunk", message, delta, starts=True)

    def whole(self, texts: Sequence[str], finishes: Sequence[str], usage: dict) -> dict:
        choices = [
            {"index": index, **self.choice(text), "logprobs": None, "finish_reason": finish}
            for index, (text, finish) in enumerate(zip(texts, finishes, strict=True))
        ]
        return self._head(self.object) | {"choices": choices, "usage": usage}

    def chunk(self, choices: list[dict]) -> dict:
        usage = {"usage": None} if self.wants_usage else {}
        return self._head(self.object_of_chunks) | {"choices": choices} | usage

    def piece(self, piece: Piece) -> dict:
        return self.chunk(
            [{"index": piece.index, **self.delta(piece.text), "logprobs": None, "finish_reason": piece.finish}]
        )

    def start(self, index: int) -> dict:
        delta = {"role": "assistant", "content": ""}
        return self.chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    @property
    def wants_usage(self) -> bool:
        return self.body.stream_options is not None and self.body.stream_options.include_usage

    def _head(self, kind: str) -> dict:
        return {"id": f"{self.prefix}-{self.id}", "object": kind, "created": self.created, "model": self.body.model}


async def _written(
    service: Service, request: Request, target: Target, *, wishes: Sequence[Wish], form: Form
) -> Response:
    """The texts of `wishes`, whole or as a stream."""
    if form.body.stream_options is not None and not form.body.stream:
        raise Problem(400, "stream_options go with stream: true", param="stream_options")
    pieces = Pieces(service.writer, service.writer.submit(target, wishes), target.settings.voice.tokenizer)
    count = Count(service, request.state.seen, target, n_prompt=sum(len(wish.prompt) for wish in wishes))
    watched = count.of(pieces)
    if form.body.stream:
        return EventStream(_events(watched, form, count, n_texts=len(wishes)), request.state.seen, pieces.cancel)
    parts: list[list[str]] = [[] for _ in wishes]
    finishes = [""] * len(wishes)

    async def collect() -> None:
        async for piece in watched:
            parts[piece.index].append(piece.text)
            finishes[piece.index] = piece.finish or ""

    await service.answered(request, asyncio.ensure_future(collect()), cancel=pieces.cancel)
    return JSONResponse(form.whole(["".join(each) for each in parts], finishes, count.usage))


async def _events(pieces: AsyncIterator[Piece], form: Form, count: Count, *, n_texts: int) -> AsyncIterator[dict]:
    if form.starts:
        for index in range(n_texts):
            yield form.start(index)
    async for piece in pieces:
        if piece.text or piece.finish:
            yield form.piece(piece)
    if form.wants_usage:
        yield form.chunk([]) | {"usage": count.usage}
