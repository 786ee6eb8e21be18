"""The command `serve`."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import click

from lora_export.cli import options
from lora_export.cli.output import Display, guarded
from lora_export.errors import EnvironmentUnusable
from lora_export.named import require_there
from lora_export.serve.options import Pooling, ServeOptions

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "tokenizers", "jinja2")
_DEFAULT = ServeOptions()
_KEY = "LORA_EXPORT_API_KEY"


def _count(name: str, default: int | None, help: str) -> options.Decorator:
    return click.option(name, default=default, show_default=default is not None, type=click.IntRange(min=1), help=help)


def _seconds(name: str, default: float, help: str) -> options.Decorator:
    return click.option(name, default=default, show_default=True, type=click.FloatRange(min=0), help=help)


_serve_options = options.as_flags(
    ServeOptions,
    *(
        click.option("--host", default=_DEFAULT.host, show_default=True, help="Address to listen on."),
        click.option("--port", default=_DEFAULT.port, show_default=True, type=click.IntRange(0, 65535),
                     help="Port to listen on; 0 for any that is free."),
        options.run_on,
        click.option("--threads", "n_threads", type=click.IntRange(min=1),
                     help="Threads within an operator.  [default: ONNX Runtime's choice]"),
        click.option("--model-name", help="The base's name in the API.  [default: its hub id or folder]"),
        _count("--max-batch", _DEFAULT.max_batch, "Most rows of one run."),
        click.option("--max-wait-ms", default=_DEFAULT.max_wait_ms, show_default=True, type=click.FloatRange(min=0),
                     help="Most time that a row waits for others to share its run."),
        _count("--max-batch-tokens", _DEFAULT.max_batch_tokens, "Most tokens of one run, padding included."),
        _count("--max-queue", _DEFAULT.max_queue, "Most rows that wait; beyond it the answer is 429."),
        _count("--max-signal-bytes", _DEFAULT.max_signal_bytes,
               "Most bytes of images and sounds in memory; beyond it the answer is 429."),
        _count("--max-cache-bytes", _DEFAULT.max_cache_bytes, "Most bytes of the texts that are written at a time."),
        _count("--max-length", None, "Most tokens of a row.  [default: what the model takes]"),
        _seconds("--timeout-s", _DEFAULT.timeout_s, "Deadline of a request."),
        _seconds("--drain-s", _DEFAULT.drain_s, "How long requests may go on after SIGTERM."),
        _count("--max-body-bytes", _DEFAULT.max_body_bytes, "Most bytes of a request."),
        _count("--max-resident-bytes", None,
               "Most bytes of the export's adapters in memory; others are read again.  [default: no bound]"),
        click.option("--map-adapters", is_flag=True,
                     help="Map the files of the export's adapters: they take no memory, and must not be written into."),
        _count("--max-adapter-bytes", _DEFAULT.max_adapter_bytes, "Most bytes of an adapter loaded at run time."),
        click.option("--api-key", envvar=_KEY, show_envvar=True,
                     help="Key that requests must have; better from the environment, as commands are seen by others."),
        click.option("--allow-runtime-adapters", "runtime_adapters", metavar="DIR",
                     type=click.Path(path_type=Path, file_okay=False),
                     help="Let clients load adapters from this folder, and unload them."),
        click.option("--pooling", type=click.Choice(Pooling),
                     help="How tokens become an embedding.  [default: the graph's own, else mean]"),
        click.option("--normalize/--no-normalize", default=None,
                     help="Give embeddings the length 1.  [default: yes; the graph's own stay as they are]"),
        click.option("--log-prompts", is_flag=True, help="Log the texts of requests, too."),
    ),
)  # fmt: skip


@click.command(name="serve", short_help="serve an export over HTTP (needs lora-export[serve])")
@click.argument("out", type=click.Path(path_type=Path))
@_serve_options
def serve_command(out: Path, flags: ServeOptions) -> None:
    """Serve the export OUT over HTTP, in the form of OpenAI's API; ends on SIGTERM once its requests are answered.

    The field `model` of a request names the base, an adapter, or a blend such as legal:0.7+medical:0.3. Requests with
    different adapters share a run. Needs lora-export[serve]. /docs describes the API, /metrics is for Prometheus.

    \b
    Example:
      lora-export serve served --port 8000
    """
    display = Display(as_json=False, quiet=False)
    with guarded(display):
        if flags.api_key is None:  # Click takes an empty variable for none
            flags = replace(flags, api_key=os.environ.get(_KEY))
        flags.require_key()
        require_there("folder of adapters", flags.runtime_adapters)
        require_packages()
        from lora_export.serve.server import serve

        serve(out, flags, display.say)


def require_packages() -> None:
    """Refuse to serve where a package of the extra is missing.

    Raises:
        EnvironmentUnusable: It is named.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentUnusable(
            "A package that the server needs is not installed",
            found=f"no {', '.join(missing)}",
            next_step="pip install 'lora-export[serve]'",
        )
