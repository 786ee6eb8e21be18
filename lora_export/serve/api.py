"""The routes, as OpenAI's API and vLLM's name them, and the page that describes them."""

from __future__ import annotations

import asyncio
import base64
import json
import time
import uuid
from collections.abc import Mapping

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from lora_export import __version__
from lora_export.answers import class_name, class_values
from lora_export.errors import LoraExportError
from lora_export.serve.data_urls import frames_of, signals_of
from lora_export.serve.encoders import Answer
from lora_export.serve.guard import Guard
from lora_export.serve.logs import log
from lora_export.serve.problems import Problem, problem_of, problem_of_body
from lora_export.serve.reranking import add_reranking
from lora_export.serve.schema import ClassifyBody, EmbeddingBody, LoadBody, UnloadBody
from lora_export.serve.service import Service, usage_of
from lora_export.serve.speech_api import add_speech
from lora_export.serve.tasks import CLASSIFICATION, FEATURES, IMAGES, OF_SIGNALS, SOUNDS, TOKENS
from lora_export.serve.tokens_api import add_tokens, classes_of_tokens
from lora_export.serve.writing_api import add_writing

_OWNER = "lora-export"
# Answers to more rows are written on another thread: the event loop has other clients to answer.
_FEW_ROWS = 16


def build(service: Service) -> Guard:
    """The application that answers for `service`."""
    api = FastAPI(
        title="lora-export", version=__version__, redoc_url=None,
        description="An export with many adapters: `model` names the base, an adapter, or a blend like `a:0.7+b:0.3`.",
    )  # fmt: skip
    _add_errors(api)
    _add_state(api, service)
    _add_models(api, service)
    _add_encoders(api, service)
    add_reranking(api, service)
    add_tokens(api, service)
    add_writing(api, service)
    add_speech(api, service)
    return Guard(api, service.options, service.metrics)


def _add_errors(api: FastAPI) -> None:
    """Every error in the form of OpenAI's API."""

    @api.exception_handler(Problem)
    @api.exception_handler(LoraExportError)
    @api.exception_handler(Exception)  # after it the error is raised again, for the log
    async def of_request(request: Request, error: Exception) -> Response:
        return _refusal(problem_of(error))

    @api.exception_handler(RequestValidationError)
    async def of_body(request: Request, error: RequestValidationError) -> Response:
        return _refusal(problem_of_body(error.errors()))

    @api.exception_handler(HTTPException)
    async def of_path(request: Request, error: HTTPException) -> Response:
        return _refusal(Problem(error.status_code, str(error.detail)), error.headers)


def _refusal(problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    # In ASCII: what a client made up may be no text.
    return Response(
        json.dumps(problem.body), problem.status, {**(headers or {}), **problem.headers}, "application/json"
    )


def _add_state(api: FastAPI, service: Service) -> None:
    @api.get("/health", tags=["state"])
    async def health() -> Response:
        """200 while the process works; restart it otherwise."""
        return PlainTextResponse("ok" if service.is_alive else "dead", 200 if service.is_alive else 500)

    @api.get("/ready", tags=["state"])
    async def ready() -> Response:
        """200 while new requests are taken: not while the queue is full, nor while the server shuts down."""
        return PlainTextResponse("ready" if service.is_ready else "not ready", 200 if service.is_ready else 503)

    @api.get("/metrics", tags=["state"])
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_models(api: FastAPI, service: Service) -> None:
    @api.get("/v1/models", tags=["models"])
    async def models() -> Response:
        """The base, and the adapters with it as their parent."""
        return JSONResponse({"object": "list", "data": _cards(service)})

    @api.get("/v1/models/{model:path}", tags=["models"])
    async def model(model: str) -> Response:
        """One of them; a blend is none of them."""
        card = next((card for card in _cards(service) if card["id"] == model), None)
        if card is None:
            raise Problem(404, f"The model {model[:200]!r} is not served", param="model", code="model_not_found")
        return JSONResponse(card)

    @api.post("/v1/load_lora_adapter", tags=["models"])
    async def load(body: LoadBody) -> Response:
        """Serve an adapter from a file; off without --allow-runtime-adapters."""
        runtime = _runtime(service)
        sha256 = await asyncio.to_thread(runtime.load, body.lora_name, body.lora_path, in_place=body.load_inplace)
        log("adapter loaded", name=body.lora_name, sha256=sha256)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @api.post("/v1/unload_lora_adapter", tags=["models"])
    async def unload(body: UnloadBody) -> Response:
        """Serve an adapter no longer; off without --allow-runtime-adapters."""
        _runtime(service)
        service.models.remove(body.lora_name)
        service.metrics.forget(body.lora_name)
        log("adapter unloaded", name=body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _runtime(service: Service):
    if service.runtime_adapters is None:
        raise Problem(
            403, "Adapters are not loaded at run time: the server was started without --allow-runtime-adapters",
            code="runtime_adapters_off",
        )  # fmt: skip
    return service.runtime_adapters


def _cards(service: Service) -> list[dict]:
    view, models = service.models.view, service.models
    common = {"object": "model", "owned_by": _OWNER, "max_model_len": models.longest}
    base = {"id": view.base, "created": models.started, "root": view.base, "parent": None, **common}
    return [base] * view.has_base + [
        {"id": name, "created": each.created, "root": each.root, "parent": view.base, **common}
        for name, each in view.adapters.items()
    ]


def _add_encoders(api: FastAPI, service: Service) -> None:
    @api.post("/v1/embeddings", tags=["encoders"])
    async def embeddings(body: EmbeddingBody, request: Request) -> Response:
        """An embedding of each input."""
        target = service.target(body, request, FEATURES)
        rows = await service.rows(body.input, target)
        found: list[Answer] = await service.answers(request, target, rows)

        def written() -> Response:
            data = [
                {"object": "embedding", "index": index, "embedding": _encoded(answer.values, body.encoding_format)}
                for index, answer in enumerate(found)
            ]
            return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": usage_of(rows)})

        return await asyncio.to_thread(written) if len(found) > _FEW_ROWS else written()

    @api.post("/v1/classify", tags=["encoders"])
    async def classify(body: ClassifyBody, request: Request) -> Response:
        """The class of each input, a text, an image or a sound, or of each of its tokens: label, and probabilities."""
        target = service.target(body, request, CLASSIFICATION, TOKENS, IMAGES, SOUNDS)
        if service.models.task == TOKENS:
            return await classes_of_tokens(body, request, service=service, target=target)
        signals = None
        if service.models.task in OF_SIGNALS:
            urls = service.listed(body.input, "input")
            service.require_room(len(urls), "input", most=service.options.max_batch)
            steps = target.settings.signals
            signals = await service.prepared(request, lambda held: signals_of(urls, steps, held))
        rows = await service.rows(body.input, target) if signals is None else list(map(frames_of, signals))
        found: list[Answer] = await service.answers(request, target, rows, signals=signals)
        data = [{"index": index, **_classes(answer, service)} for index, answer in enumerate(found)]
        return JSONResponse(
            {
                "id": f"classify-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()),
                "model": body.model, "data": data, "usage": usage_of(rows),
            }
        )  # fmt: skip


def _encoded(values: np.ndarray, form: str) -> list[float] | str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode() if form == "base64" else values.tolist()


def _classes(answer: Answer, service: Service) -> dict:
    labels, values = answer.target.labels, answer.values
    probabilities = class_values(values, answer.target.settings.problem_type).tolist()
    best = int(values.argmax())
    return {
        "label": class_name(labels, best), "probs": probabilities, "num_classes": len(values),
        "labels": [class_name(labels, index) for index in range(len(values))],
    }  # fmt: skip
