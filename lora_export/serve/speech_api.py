"""`/v1/audio/transcriptions` and `/v1/audio/translations`: a sound as text, as OpenAI's API has it."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import ValidationError

from lora_export.contract import ENCODER
from lora_export.errors import InputRefused
from lora_export.runtime.arrays import numpy_dtype
from lora_export.runtime.sampling import Sampling
from lora_export.runtime.sound import read_wav
from lora_export.runtime.targets import TRANSCRIBE, TRANSLATE, fixed_part, languages_of, speech_start
from lora_export.serve.counting import Count
from lora_export.serve.data_urls import frames_of, signal_of
from lora_export.serve.events import EventStream
from lora_export.serve.forms import read_form
from lora_export.serve.models import Models, Target
from lora_export.serve.pieces import Piece, Pieces
from lora_export.serve.problems import Problem, problem_of_body
from lora_export.serve.room import Held
from lora_export.serve.schema import Body, SpeechBody, TranslationBody
from lora_export.serve.service import Service
from lora_export.serve.tasks import CTC, SPEECH
from lora_export.serve.texts import Voice
from lora_export.serve.writing import Wish

_FILE, _FORM = "file", "multipart/form-data"


def add_speech(api: FastAPI, service: Service) -> None:
    """The routes of speech recognition."""

    @api.post("/v1/audio/transcriptions", tags=["speech"], openapi_extra=_described(SpeechBody))
    async def transcriptions(request: Request) -> Response:
        """What is said in a WAV file of 16 bits, at the model's sampling rate."""
        return await _written_down(request, service, SpeechBody)

    @api.post("/v1/audio/translations", tags=["speech"], openapi_extra=_described(TranslationBody))
    async def translations(request: Request) -> Response:
        """The same in English, by a model that translates."""
        return await _written_down(request, service, TranslationBody)


def _described(body: type[Body]) -> dict:
    schema = body.model_json_schema()
    schema["properties"][_FILE] = {"type": "string", "format": "binary"}
    schema["required"] = [*schema["required"], _FILE]
    return {"requestBody": {"required": True, "content": {_FORM: {"schema": schema}}}}


@dataclass(frozen=True)
class _Heard:
    """A request's sound, and how it is to be written down."""

    body: SpeechBody | TranslationBody
    task: str
    seconds: float
    wish: Wish | None
    languages: Mapping[int, str]

    def language(self, start: list[int] | None) -> str | None:
        """The sound's language: asked for, or found by the model at the start of its text, or its only one.

        Args:
            start: None where the model does not say.
        """
        if start is None:
            return None
        asked = getattr(self.body, "language", None)
        found = next((self.languages[token] for token in start if token in self.languages), None)
        return asked or found or (None if self.languages else "en")


async def _written_down(request: Request, service: Service, kind: type[Body]) -> Response:
    form = await read_form(request)
    try:
        body = kind.model_validate(form.fields)
    except ValidationError as error:
        raise problem_of_body(error.errors(), in_body=False) from None
    if set(form.files) != {_FILE}:
        other = next((name for name in form.files if name != _FILE), None)
        raise Problem(400, f"The form has no file {_FILE!r}" if other is None else f"The file {other[:80]!r} is not "
                      "supported", param=other or _FILE, code="bad_value")  # fmt: skip
    target = service.target(body, request, SPEECH, CTC)
    if service.models.task == CTC:
        return await _of_frames(request, service, target, body=body, file=form.files[_FILE])
    voice = target.settings.voice
    file = form.files[_FILE]
    heard = await service.prepared(request, lambda held: _heard(body, file, voice, models=service.models, held=held))
    request.state.seen.fields["seconds"] = round(heard.seconds, 3)
    pieces = Pieces(service.writer, service.writer.submit(target, [heard.wish]), voice.tokenizer)
    watched = Count(service, request.state.seen, target, n_prompt=0).of(pieces)
    if getattr(body, "stream", False):
        return EventStream(_events(watched, heard), request.state.seen, pieces.cancel)
    parts: list[str] = []

    async def collect() -> None:
        async for piece in watched:
            parts.append(piece.text)

    await service.answered(request, asyncio.ensure_future(collect()), cancel=pieces.cancel)
    return _answer("".join(parts).strip(), heard, pieces.start_of(0))


async def _of_frames(
    request: Request, service: Service, target: Target, *, body: SpeechBody | TranslationBody, file: bytes
) -> Response:
    """The text of a model that has a token for each frame: it knows neither languages nor chance."""
    asked = [name for name in ("language", "temperature", "stream") if getattr(body, name, None)]
    if asked or isinstance(body, TranslationBody):
        field = next(iter(asked), None)
        said = "There is no translation" if field is None else f"The field {field!r} means nothing"
        raise Problem(
            400, f"{said} to {body.model!r}: it transcribes frame by frame", param=field, code="unsupported_field"
        )
    steps = target.settings.signals
    signal = await service.prepared(request, lambda held: signal_of(file, steps, held, where=_FILE))
    (answer,) = await service.answers(request, target, [frames_of(signal)], signals=[signal])
    seconds = len(signal) / steps.rate
    request.state.seen.fields["seconds"] = round(seconds, 3)
    text = target.settings.words.text(answer.values)
    return _answer(text, _Heard(body, TRANSCRIBE, seconds, None, {}), None)


def _heard(body: SpeechBody | TranslationBody, file: bytes, voice: Voice, *, models: Models, held: Held) -> _Heard:
    """The request, checked.

    Raises:
        Problem: There is no room for its sound.
        InputRefused: The file is no sound that the model takes.
        UsageProblem: The model does not know the language, or does not translate.
    """
    task = TRANSLATE if isinstance(body, TranslationBody) else TRANSCRIBE
    start = speech_start(voice.defaults, getattr(body, "language", None), task)
    samples = read_wav(io.BytesIO(file), voice.ears.rate, where=_FILE)
    features = voice.ears.features(samples)
    spec = models.manifest.graphs[ENCODER].inputs[0]
    if features.shape != tuple(spec.dims[1:]):
        raise InputRefused(
            "The export's settings of sounds do not make what its encoder takes",
            expected=f"{spec.dims[1]} bands, {spec.dims[2]} frames",
            found=f"{features.shape[0]} bands, {features.shape[1]} frames",
        )
    source = features.astype(numpy_dtype(spec.dtype))
    held.take_array(source)
    wish = Wish(
        (), Sampling(body.temperature or 0.0), models.longest - len(start), voice.eos_ids,
        source={spec.name: source}, rules=voice.rules, start=start,
    )  # fmt: skip
    by_token = {token: language for language, token in languages_of(voice.defaults).items()}
    return _Heard(body, task, len(samples) / voice.ears.rate, wish, by_token)


def _answer(text: str, heard: _Heard, start: list[int] | None) -> Response:
    if heard.body.response_format == "text":
        return PlainTextResponse(f"{text}\n")
    usage = {"usage": {"type": "duration", "seconds": heard.seconds}}
    if heard.body.response_format == "json":
        return JSONResponse({"text": text} | usage)
    language = heard.language(None if start is None else [*fixed_part(heard.wish.start), *start])
    said = {} if language is None else {"language": language}
    return JSONResponse({"task": heard.task, **said, "duration": heard.seconds, "text": text} | usage)


async def _events(pieces: AsyncIterator[Piece], heard: _Heard) -> AsyncIterator[dict]:
    text = ""
    async for piece in pieces:
        new = piece.text if text else piece.text.lstrip()
        text += new
        if new:
            yield {"type": "transcript.text.delta", "delta": new}
    usage = {"type": "duration", "seconds": heard.seconds}
    yield {"type": "transcript.text.done", "text": text, "usage": usage}
