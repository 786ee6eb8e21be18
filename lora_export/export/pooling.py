"""Whether the graph makes an embedding of a text, and how: named, or as a sentence-transformers folder says.

An adapter's own folder says how it was trained, so it wins over the base's. One graph has one way.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_export.adapters.folder import AdapterFolder
from lora_export.artifact import AdapterRecord
from lora_export.base.checkpoint import Checkpoint
from lora_export.base.sentence_folder import (
    PROMPTS,
    SentenceHead,
    read_head,
    says_embedding,
    sentence_root,
    transformer_settings,
)
from lora_export.base.tasks import Task
from lora_export.errors import InputRefused, UsageProblem
from lora_export.named import expanded
from lora_export.reading import read_json_if_there
from lora_export.sentence import AUTO, NONE, Pooling, SentenceEmbedding, equal_embeddings


@dataclass(frozen=True)
class ChosenHead:
    """What makes an embedding of a text.

    Attributes:
        head: None for hidden states alone.
        own: What was read of how sources embed, by the adapter's name, "" of the base.
        remarks: What to say of it.
    """

    head: SentenceHead | None = None
    own: Mapping[str, SentenceHead] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def task_for(task: str | None, pooling: str | None) -> str | None:
    """The task that is asked for: a pooled embedding is one of features.

    Raises:
        UsageProblem: Another one was named with it.
    """
    if pooling in (None, NONE):
        return task
    if task not in (None, Task.FEATURE_EXTRACTION):
        raise UsageProblem(
            "--pooling is for embeddings of texts",
            where="--task",
            expected=str(Task.FEATURE_EXTRACTION),
            found=task,
            next_step="leave --pooling or --task out",
        )
    return Task.FEATURE_EXTRACTION


def choose_head(
    pooling: str | None, task: Task, *, checkpoint: Checkpoint, folders: Sequence[AdapterFolder]
) -> ChosenHead:
    """What makes an embedding of a text.

    Args:
        pooling: See `Request.pooling`.

    Raises:
        InputRefused: The folders say nothing of pooling, differ, or say what cannot be part of a graph.
    """
    roots = {folder.name: sentence_root(folder.path) for folder in folders}
    own = {name: root for name, root in roots.items() if root is not None}
    base = sentence_root(checkpoint.path)
    if pooling in (None, NONE):
        is_told = pooling is None and task is Task.FEATURE_EXTRACTION and (own or base is not None)
        said = "the folder is one of sentence-transformers: --pooling auto makes its pooling part of the graph"
        return ChosenHead(remarks=(said,) if is_told else ())
    if pooling in tuple(Pooling):
        return ChosenHead(SentenceHead(SentenceEmbedding((Pooling(pooling),))))
    if pooling != AUTO:
        head = _of_folder(expanded(pooling), base, own)
        return ChosenHead(head, {} if head.embedding.source is None else {head.embedding.source: head})
    found = [read_head(root, name) for name, root in own.items()] or ([read_head(base, "")] if base else [])
    if not found:
        raise InputRefused(
            "Neither the base nor an adapter says how its states become an embedding",
            where=str(checkpoint.path),
            expected="a folder that sentence-transformers saved, with modules.json",
            next_step="name the pooling: --pooling " + " or ".join(Pooling),
        )
    if not equal_embeddings(*(head.embedding for head in found)):
        raise InputRefused(
            "The adapters were trained with different embeddings; one graph makes one",
            where=", ".join(map(str, own.values())),
            found="; ".join(f"{head.embedding.source}: {head.embedding.described}" for head in found),
            next_step="export each to its own folder, or name the pooling with --pooling",
        )
    said = (f"embeddings by {found[0].embedding.described}", *remarks_on_texts(found[0].root))
    return ChosenHead(found[0], {head.embedding.source: head for head in found}, said)


def _of_folder(root: Path, base: Path | None, own: dict[str, Path]) -> SentenceHead:
    """The head of a folder that was named: the base's, an adapter's, or one that is neither."""
    named = {name: path.resolve() for name, path in own.items()} | ({"": base.resolve()} if base else {})
    return read_head(root.resolve(), next((name for name, path in named.items() if path == root.resolve()), None))


def remarks_on_texts(root: Path, adapter: str | None = None) -> tuple[str, ...]:
    """What a host must do to a text before the graph gets its tokens, as the sentence-transformers folder `root` says.

    Args:
        adapter: Whose texts they are; None for all.
    """
    settings, prompts = transformer_settings(root), read_json_if_there(root / PROMPTS)
    named, found = prompts.get("default_prompt_name"), []
    if settings.get("do_lower_case") is True:
        found.append("are made lower case before the tokenizer gets them, which hosts must do")
    if isinstance(settings.get("max_seq_length"), int):
        found.append(f"are cut to {settings['max_seq_length']} tokens, which hosts must do")
    by_name = prompts.get("prompts")
    if isinstance(named, str) and isinstance(by_name, dict) and by_name.get(named):
        found.append(f"begin with the prompt {by_name[named]!r}, which hosts must put before them")
    whose = "its texts" if adapter is None else f"the texts of adapter {adapter!r}"
    return tuple(f"{whose} {each}" for each in found)


def pooling_again(embedding: SentenceEmbedding | None, base: Path, adapters: Mapping[str, Path]) -> str | None:
    """What to ask for (`Request.pooling`) to make the same embedding again, of the sources that were found again."""
    if embedding is None:
        return None
    if embedding.source is None:
        return str(embedding.pooling[0])
    return str(sentence_root(adapters.get(embedding.source, base)))


def same_heads(
    embedding: SentenceEmbedding | None, folders: Sequence[AdapterFolder]
) -> tuple[dict[str, SentenceHead], tuple[str, ...]]:
    """How adapters that are added to an export embed, by name, and what to say of it; nothing of those whose folders
    say nothing, or where the export makes no embedding.

    Raises:
        InputRefused: An adapter was trained with another embedding than the export makes.
    """
    heads: dict[str, SentenceHead] = {}
    for folder in folders if embedding is not None else ():
        root = sentence_root(folder.path)
        if root is None:
            continue
        heads[folder.name] = read_head(root, folder.name)
        if not equal_embeddings(heads[folder.name].embedding, embedding):
            raise of_another_embedding(folder.name, heads[folder.name], embedding)
    said = [sentence for name, head in heads.items() for sentence in remarks_on_texts(head.root, name)]
    return heads, tuple(said)


def of_another_embedding(name: str, found: SentenceHead, made: SentenceEmbedding) -> InputRefused:
    """The refusal of adapter `name`, trained with `found`, by an export that makes another embedding."""
    return InputRefused(
        f"Adapter {name!r} was trained with another embedding than the export makes",
        where=str(found.root),
        expected=made.described,
        found=found.embedding.described,
        next_step="export it to a folder of its own with --pooling auto",
    )


def without_source(
    embedding: SentenceEmbedding | None, gone: Collection[str], left: Sequence[AdapterRecord]
) -> SentenceEmbedding | None:
    """The embedding of an export that the adapters `gone` leave: the folder that says how is that of one of `left`.

    Raises:
        InputRefused: It was that of one of `gone`, and none of `left` says the same: `check` and `bench` would have
            nothing to read it from.
    """
    if embedding is None or not embedding.source or embedding.source not in gone:
        return embedding
    other = next((record.name for record in left if says_embedding(record.source.files)), None)
    if other is None and not embedding.is_named:
        raise InputRefused(
            f"The folder of adapter {embedding.source!r} says how the export makes its embedding; without it, nothing "
            "could be compared with that",
            found=embedding.described,
            next_step="leave the adapter in, or export the others to a folder of their own",
        )
    return replace(embedding, source=other)
