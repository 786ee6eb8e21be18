"""The route of rerankers, classifiers of pairs of texts with one label: `/v1/rerank`, as Jina's and vLLM's."""

from __future__ import annotations

import uuid

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from lora_export.serve.encoders import Answer
from lora_export.serve.problems import Problem
from lora_export.serve.schema import RerankBody
from lora_export.serve.service import Service, usage_of
from lora_export.serve.tasks import CLASSIFICATION

# Where sentence-transformers writes what a cross-encoder's score goes through, today and before.
_SECTION, _FIELD, _OLD_FIELD = "sentence_transformers", "activation_fn", "sbert_ce_default_activation_function"


def add_reranking(api: FastAPI, service: Service) -> None:
    """Add the route to `api`."""

    @api.post("/v1/rerank", tags=["encoders"])
    @api.post("/rerank", tags=["encoders"], include_in_schema=False)
    async def rerank(body: RerankBody, request: Request) -> Response:
        """How relevant each document is to the query, the most relevant first."""
        target = service.target(body, request, CLASSIFICATION)
        texts = [each if isinstance(each, str) else each.text for each in body.documents]
        rows, types = await service.pairs(body.query, texts, target)
        found: list[Answer] = await service.answers(request, target, rows, types=types)
        if len(found[0].values) != 1:
            raise Problem(
                400, f"{body.model!r} has {len(found[0].values)} classes, and a reranker one score", param="model",
                code="no_reranker",
            )  # fmt: skip
        scores = relevances(np.array([answer.values[0] for answer in found]), service.models.config)
        order = np.argsort(-scores, kind="stable")[: body.top_n or len(scores)]
        results = [
            {"index": int(i), "relevance_score": float(scores[i])}
            | ({"document": {"text": texts[i]}} if body.return_documents else {})
            for i in order
        ]
        head = {"id": f"rerank-{uuid.uuid4().hex}", "model": body.model}
        return JSONResponse(head | {"usage": usage_of(rows), "results": results})


def relevances(logits: np.ndarray, config: dict) -> np.ndarray:
    """Scores of one label as sentence-transformers gives them: through a sigmoid, unless the configuration names
    Identity.

    Raises:
        Problem: 400 where it names another function.
    """
    named = (config.get(_SECTION) or {}).get(_FIELD) or config.get(_OLD_FIELD) or "Sigmoid"
    function = str(named).rpartition(".")[2]
    if function == "Identity":
        return logits.astype(np.float64)
    if function != "Sigmoid":
        raise Problem(
            400, f"Scores go through {function}, which is not known here; /v1/classify gives them as they are"
        )
    return 1 / (1 + np.exp(-logits.astype(np.float64)))
