"""The padding token of a classifier that reads a text at its last token: decoders with a `score` head.

Such a model looks for the last token that is not the padding token, so its graph holds that token's id. The base's
config often names none: its trainer set one, and an adapter's config cannot record it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lora_export.adapters.folder import AdapterFolder
from lora_export.base.checkpoint import Checkpoint
from lora_export.base.tasks import Task
from lora_export.carried import padding_token
from lora_export.errors import InputRefused
from lora_export.reading import read_json

_OPTION = "--pad-token-id"


def reads_last_token(task: Task, model: torch.nn.Module) -> bool:
    """Whether `model` finds the token to classify by its config's padding token."""
    return task is Task.TEXT_CLASSIFICATION and "pad_token_id" in inspect.getsource(type(model).forward)


def choose_padding(
    requested: int | None, folders: Sequence[AdapterFolder], checkpoint: Checkpoint, *, config, is_fixed: bool = False
) -> tuple[int, tuple[str, ...]]:
    """The padding token to export a classifier on a decoder with, and what to say of it.

    1. The one that was asked for.
    2. The adapters' own: of a `config.json` beside the adapter, else of its tokenizer.
    3. The base's: of its config, else of its tokenizer.

    Args:
        is_fixed: The graph is there already, with the one that was asked for.

    Raises:
        InputRefused: There is none, adapters differ in theirs, or it is no token of the model.
    """
    n_tokens = config.get_text_config().vocab_size
    base = _within(config.get_text_config().pad_token_id, n_tokens)
    own = {f.name: token for f in folders if (token := _within(_own(f.path), n_tokens)) is not None}
    if requested is None and len(set(own.values())) > 1:
        raise InputRefused(
            "The adapters were trained with different padding tokens; one graph has one",
            where=", ".join(str(folder.path) for folder in folders if folder.name in own),
            found=", ".join(f"{name}: {token}" for name, token in own.items()),
            next_step=f"export each on its own, or name one with {_OPTION} and pad with it",
        )
    other = {name: token for name, token in own.items() if is_fixed and token != requested}
    if other:
        raise InputRefused(
            "The adapter was trained with another padding token than the export's",
            where=", ".join(str(folder.path) for folder in folders if folder.name in other),
            expected=str(requested),
            found=", ".join(f"{name}: {token}" for name, token in other.items()),
            next_step=f"export it on its own; or take the tokenizer's files out of its folder, to pad with {requested}",
        )
    found = (requested, next(iter(own.values()), None), base)
    token = next((token for token in found if token is not None), None)
    token = _within(padding_token(checkpoint.path), n_tokens) if token is None else token
    if token is None:
        raise InputRefused(
            "A classifier on this decoder needs a padding token: it reads a text at its last token that is no padding",
            where=f"{checkpoint.path}/config.json: pad_token_id",
            expected="the id that the adapter was trained with, there, in the adapter's tokenizer, or as an option",
            found="none",
            next_step=f"name it with {_OPTION}, often the id of the end token",
        )
    _require_row(token, n_tokens)
    return token, _remarks(token, base, own, requested=requested)


def with_padding(config, token: int):
    """A copy of `config` with this padding token."""
    config = copy.deepcopy(config)
    config.get_text_config().pad_token_id = token
    return config


def padded_fields(fields: Mapping[str, object], token: int | None) -> dict:
    """The fields of a `config.json` with this padding token, wherever the model reads it."""
    if token is None:
        return dict(fields)
    inner = fields.get("text_config")
    return {**fields, "pad_token_id": token} | (
        {"text_config": {**inner, "pad_token_id": token}} if isinstance(inner, Mapping) else {}
    )


def _own(adapter: Path) -> int | None:
    path = adapter / "config.json"
    token = read_json(path).get("pad_token_id") if path.is_file() else None
    return padding_token(adapter) if token is None else token


def _within(token: object, n_tokens: int) -> int | None:
    """`token` if the model has it; LLaMA's first configs say -1."""
    is_token = isinstance(token, int) and not isinstance(token, bool)
    return token if is_token and 0 <= token < n_tokens else None


def _require_row(token: int, n_tokens: int) -> None:
    if _within(token, n_tokens) is None:
        raise InputRefused(
            "The padding token is no token of the model",
            where=_OPTION,
            expected=f"0 to {n_tokens - 1}",
            found=str(token),
            next_step="name the id that the adapter was trained with",
        )


def _remarks(token: int, base: int | None, own: Mapping[str, int], *, requested: int | None) -> tuple[str, ...]:
    if requested is not None or token == base:
        return ()
    whose = f"adapter {next(iter(own))!r}" if own else "the base's tokenizer"
    instead = f"the base's config says {base}" if base is not None else "the base's config names none"
    return (f"texts are classified at their last token that is not {token}, the padding token of {whose}; {instead}",)
