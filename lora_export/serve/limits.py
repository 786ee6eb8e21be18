"""How long a row may be, and how many texts are written at a time: by the model, its memory, and what was asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lora_export.artifact import Manifest
from lora_export.contract import DECODER_WITH_PAST, SINGLE, TensorSpec
from lora_export.errors import UsageProblem
from lora_export.runtime.arrays import numpy_dtype
from lora_export.serve.options import ServeOptions
from lora_export.serve.tasks import SPEECH, WRITING

# Names of sizes in a model's configuration that limit a text.
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_POSITIONS_OF_SPEECH = ("max_target_positions",)
# Position tables of these begin behind the padding token's place.
_OFFSET_POSITIONS = frozenset({"roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "data2vec-text", "esm"})


def longest_row(manifest: Manifest, config: Mapping, options: ServeOptions, *, made_for: int | None) -> int:
    """The most tokens of a row: what positions there are, what the tokenizer was made for, what was asked.

    Of texts that are written, what the cache has room for, unless more is asked for. Of speech, of the text.

    Args:
        config: The model's.
        made_for: The most tokens that the tokenizer was made for, where it bounds a row.
    """
    asked, names = options.max_length, _POSITIONS_OF_SPEECH if manifest.task == SPEECH else _POSITIONS
    positions = next((config[name] for name in names if isinstance(config.get(name), int)), None)
    if positions and config.get("model_type") in _OFFSET_POSITIONS:
        positions -= (config.get("pad_token_id") or 0) + 1
    limits = [limit for limit in (positions, made_for) if limit]
    if asked is not None and limits and asked > min(limits):
        raise UsageProblem("The model takes no rows of that length", where="--max-length", expected=f"at most "
                           f"{min(limits)}", found=str(asked))  # fmt: skip
    found = [*limits, *([asked] if asked else [])]
    if manifest.task in WRITING and manifest.task != SPEECH and asked is None:
        found.append(options.max_cache_bytes // (options.max_batch * _bytes_a_token(_past(manifest))))
    if not found:
        raise UsageProblem(
            "Neither the model nor its tokenizer says how long a text may be", next_step="give --max-length"
        )
    return min(found)


def most_texts(manifest: Manifest, config: Mapping, options: ServeOptions, *, longest: int) -> int:
    """The most texts that are written at a time; of speech, whose sounds are of one length, what memory there is for.

    Args:
        longest: The most tokens of a text.
    """
    if manifest.task != SPEECH:
        return options.max_batch
    past, n_source = _past(manifest), config.get("max_source_positions") or 1500
    of_sound = [spec for spec in past if ".encoder." in spec.name]
    of_text = [spec for spec in past if spec not in of_sound]
    n_bytes = n_source * _bytes_a_token(of_sound) + longest * _bytes_a_token(of_text)
    return max(1, min(options.max_batch, options.max_cache_bytes // n_bytes))


def _past(manifest: Manifest) -> tuple[TensorSpec, ...]:
    return manifest.graphs[SINGLE if SINGLE in manifest.graphs else DECODER_WITH_PAST].past


def _bytes_a_token(past: Iterable[TensorSpec]) -> int:
    """Of a decoder's cache, for one token of one row."""
    return max(1, sum(spec.dims[1] * spec.dims[3] * numpy_dtype(spec.dtype).itemsize for spec in past))
