"""Greedy generation with an exported decoder: one prefill, then one token at a time on the cache. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lora_export.contract import GATE_INPUT, LOGITS_TO_KEEP
from lora_export.runtime.adapter_session import AdapterSession, RowAdapter
from lora_export.runtime.host_inputs import empty


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """`(input_ids, attention_mask)`, int64 `[batch, longest]`, padded on the left."""
    longest = max(map(len, prompts))
    ids = np.full((len(prompts), longest), pad_id, np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def empty_cache(session: AdapterSession, batch: int) -> dict[str, np.ndarray]:
    """The graph's past of length 0, `[batch, kv_heads, 0, head_size]` by input name."""
    return {spec.name: empty(spec, batch) for spec in session.manifest.contract.past}


def generate(
    session: AdapterSession,
    prompts: Sequence[Sequence[int]],
    adapters: Sequence[RowAdapter] | RowAdapter = None,
    *,
    max_new_tokens: int,
    eos_ids: frozenset[int] = frozenset(),
    pad_id: int = 0,
) -> list[list[int]]:
    """The greedy continuation of each prompt, without the prompt, up to and without an end token.

    A text goes on with the adapters that it was begun with, whatever another thread loads or unloads meanwhile.

    Args:
        prompts: Token ids of each row; rows may differ in length.
        adapters: As in `AdapterSession.run`.
        pad_id: Filler on the left of shorter rows; masked, so any id serves.
    """
    session = session.snapshot()
    ids, mask = left_pad(prompts, pad_id)
    cache = session.cache(len(prompts), ids.shape[1] + max_new_tokens)
    gate = session.gate(ids, adapters)
    last = {spec.name: np.array(1) for spec in session.contract.optional_inputs if spec.name == LOGITS_TO_KEEP}
    generated: list[list[int]] = [[] for _ in prompts]
    finished = np.zeros(len(prompts), bool)
    for _ in range(max_new_tokens):
        feeds = {"input_ids": ids, "attention_mask": mask} | last
        if gate is not None:
            feeds[GATE_INPUT] = gate
        results = session.run(feeds, adapters, cache=cache)
        best = results["logits"][:, -1].astype(np.float32).argmax(axis=-1)
        for row, token in enumerate(best):
            finished[row] |= int(token) in eos_ids
            if not finished[row]:
                generated[row].append(int(token))
        if finished.all():
            break
        ids = best[:, None].astype(np.int64)
        gate = None if gate is None else gate[:, -1:]
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
    return generated
