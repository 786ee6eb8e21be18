"""`Metrics`: what Prometheus reads, by adapter, and `vllm:lora_requests_info` as the Kubernetes gateway reads it.

The gateway's inference extension takes from the newest series of `vllm:lora_requests_info` which adapters run and wait
(labels with names, joined by commas) and how many may (`max_lora`); its value is the time of that. It takes the length
of the queue from `vllm:num_requests_waiting`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from lora_export.serve.names import adapters_in

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
# Labels of requests that are of no one adapter: no model yet, any blend, an adapter that has been unloaded.
NO_MODEL, BLEND, UNLOADED = "none", "blend", "unloaded"
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Load:
    """What a server does at one moment.

    Attributes:
        running: The model of each row that runs.
        waiting: The model of each row that waits.
        most: How many rows may run at once.
        is_ready: Whether new requests are taken.
    """

    running: Sequence[str]
    waiting: Sequence[str]
    most: int
    is_ready: bool


class Metrics:
    """The figures of one server, in a registry of its own.

    Args:
        load: What the server does now.
        adapters: The names of the adapters that are served now.
        base: The base's.
    """

    def __init__(self, load: Callable[[], Load], adapters: Callable[[], Collection[str]], base: str) -> None:
        self._adapters, self._others = adapters, frozenset({base, NO_MODEL, BLEND})
        disable_created_metrics()  # a series more for each, which nothing here reads
        self._registry = registry = CollectorRegistry(auto_describe=False)
        self.requests = Counter(
            "lora_export_requests", "Requests by path, model and status.", ["path", "model", "status"],
            registry=registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "lora_export_request_seconds", "From a request's first byte to the end of its answer.",
            ["path", "model"], buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.first_token_seconds = Histogram(
            "lora_export_first_token_seconds", "To the first token of an answer that is generated.", ["model"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.tokens = Counter(
            "lora_export_tokens", "Tokens of prompts and of answers.", ["model", "kind"], registry=registry
        )
        self.batch_rows = Histogram("lora_export_batch_rows", "Rows of a run.", buckets=_ROWS, registry=registry)
        self.batch_models = Histogram(
            "lora_export_batch_models", "Different models in a run.", buckets=_ROWS, registry=registry
        )
        self.batch_seconds = Histogram(
            "lora_export_batch_seconds", "Time of a run.", buckets=_SECONDS, registry=registry
        )
        registry.register(_Now(load, adapters))
        self._of_models = (self.requests, self.seconds, self.first_token_seconds, self.tokens)

    def ran(self, models: Sequence[str], seconds: float) -> None:
        """A run of rows with these models is over."""
        self.batch_rows.observe(len(models))
        self.batch_models.observe(len(set(models)))
        self.batch_seconds.observe(seconds)

    def label(self, model: str) -> str:
        """`model`, or "unloaded" for an adapter that has gone meanwhile: its series have ended."""
        return model if model in self._others or model in self._adapters() else UNLOADED

    def forget(self, model: str) -> None:
        """Drop the series of a model that is served no longer."""
        for metric in self._of_models:
            metric.remove_by_labels({"model": model})

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)


class _Now:
    """The gauges, read when they are asked for."""

    def __init__(self, load: Callable[[], Load], adapters: Callable[[], Collection[str]]) -> None:
        self._load, self._adapters = load, adapters

    def collect(self) -> Iterator[Metric]:
        load, served = self._load(), set(self._adapters())
        running, waiting = (
            ",".join(dict.fromkeys(name for model in rows for name in adapters_in(model, served)))
            for rows in (load.running, load.waiting)
        )
        yield GaugeMetricFamily("vllm:num_requests_running", "Rows that run.", value=len(load.running))
        yield GaugeMetricFamily("vllm:num_requests_waiting", "Rows that wait.", value=len(load.waiting))
        yield GaugeMetricFamily(
            "vllm:kv_cache_usage_perc", "Share of the rows that may run which do.", value=len(load.running) / load.most
        )
        info = GaugeMetricFamily(
            "vllm:lora_requests_info", "Adapters of the rows that run and wait; the value is the time.",
            labels=["max_lora", "waiting_lora_adapters", "running_lora_adapters"],
        )  # fmt: skip
        info.add_metric([str(load.most), waiting, running], time.time())
        yield info
        yield GaugeMetricFamily("lora_export_adapters", "Adapters that are served.", value=len(served))
        yield GaugeMetricFamily("lora_export_ready", "1 if new requests are taken.", value=int(load.is_ready))
