"""What a server is started with, and the most that it takes; the command line's options are these."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from lora_export.errors import UsageProblem


class Pooling(StrEnum):
    """How the states of a text's tokens become one embedding, where the graph does not make it itself."""

    MEAN = "mean"  # over the text's tokens, padding left out
    FIRST = "first"  # the first token's, as BERT's [CLS]
    LAST = "last"  # the last token's, as decoders are read
    POOLER = "pooler"  # the model's own `pooler_output`


@dataclass(frozen=True)
class ServeOptions:
    """How an export is served.

    Attributes:
        model_name: The base's name in the API; None for the name that the manifest gives.
        max_batch: Most rows of one run.
        max_wait_ms: How long a row waits for others that are due, while requests come side by side.
        max_batch_tokens: Most tokens of one run, padding included; a longer row runs alone.
        max_queue: Most rows that wait; beyond it, 429.
        max_signal_bytes: Of the images and sounds in memory, with the bodies of their requests; beyond it, 429.
        max_cache_bytes: Of the keys and values of texts that are written; it bounds their length.
        max_length: Most tokens of a row, prompt and answer; None for what the model takes.
        timeout_s: The deadline of a request, from its first byte.
        drain_s: How long requests may go on after SIGTERM.
        max_body_bytes: Most bytes of a request.
        max_resident_bytes: Most bytes of the export's adapters in memory; others are read again when they are needed.
            None for no bound.
        map_adapters: Whether the files of the export's adapters are mapped, and take no memory of their own.
        max_adapter_bytes: Most bytes of an adapter that is loaded at run time.
        runtime_adapters: The folder that adapters may be loaded from at run time; None for none.
        api_key: What requests must have; None for a server that asks for none.
        pooling: None for the graph's own embedding, else the mean.
        normalize: Whether embeddings are made of length 1; None for yes, but for the graph's own.
        log_prompts: Whether the log has the texts of requests.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    provider: str | None = None
    n_threads: int | None = None
    model_name: str | None = None
    max_batch: int = 32
    max_wait_ms: float = 5.0
    max_batch_tokens: int = 16384
    max_queue: int = 1024
    max_signal_bytes: int = 1_000_000_000
    max_cache_bytes: int = 2_000_000_000
    max_length: int | None = None
    timeout_s: float = 60.0
    drain_s: float = 30.0
    max_body_bytes: int = 1_000_000
    max_resident_bytes: int | None = None
    map_adapters: bool = False
    max_adapter_bytes: int = 1_000_000_000
    api_key: str | None = None
    runtime_adapters: Path | None = None
    pooling: Pooling | None = None
    normalize: bool | None = None
    log_prompts: bool = False

    def require_key(self) -> None:
        """Refuse a key that is no key.

        Raises:
            UsageProblem: It is empty or blank: every request would have it.
        """
        if self.api_key is not None and not self.api_key.strip():
            raise UsageProblem(
                "The key is empty, so every request would have it",
                where="--api-key or LORA_EXPORT_API_KEY",
                expected="a key, or none at all for a server without one",
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
