"""The embedding of a fleet's graph: named, or as the sentence-transformers folders of adapters and base say.

One graph makes one embedding. Where folders differ, the graph makes what the fleet that is renewed makes, if one of
them still says so: what its hosts stored stays comparable. Else it makes what most adapters were trained with, of as
many the first in the list; an adapter whose folder says nothing counts for what the base's says. Each adapter whose
folder says otherwise is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lora_export.base.checkpoint import Checkpoint, locate
from lora_export.base.sentence_folder import SentenceHead, read_head, sentence_root
from lora_export.base.tasks import Task
from lora_export.errors import InputRefused, LoraExportError
from lora_export.export.pooling import choose_head, of_another_embedding
from lora_export.export.records import with_settings
from lora_export.fleet.outcomes import AdapterOutcome
from lora_export.fleet.sources import Opened, refusal
from lora_export.sentence import AUTO, NONE, SentenceEmbedding, equal_embeddings


@dataclass(frozen=True)
class FleetEmbedding:
    """How the graph of a fleet makes an embedding of a text.

    Attributes:
        pooling: As `Request.pooling` has it.
        head: What makes it; None where there is none.
        names: The adapters whose own folders say so, where the base's does not.
    """

    pooling: str | None = None
    head: SentenceHead | None = None
    names: tuple[str, ...] = ()

    @property
    def facts(self) -> dict[str, object]:
        """What the graph is made from, besides what every fleet's is: JSON values."""
        return {} if self.head is None else {"embedding": asdict(replace(self.head.embedding, source=None))}

    @property
    def described(self) -> str | None:
        """In words; None where there is none."""
        return None if self.head is None else self.head.embedding.described

    @property
    def root(self) -> Path | None:
        """The sentence-transformers folder of an adapter that says so; None where the base's does, or the user."""
        return self.head.root if self.names else None

    def recorded(self, made: SentenceEmbedding | None, served: Collection[str]) -> SentenceEmbedding | None:
        """`made`, the manifest's, with the first of the adapters `served` whose folder says so as its source.

        Raises:
            InputRefused: None of them is served, so nothing could be compared with what its linear layers make.
        """
        if made is None or not self.names:
            return made
        source = next((name for name in self.names if name in served), None)
        if source is None and not made.is_named:
            raise InputRefused(
                "No adapter is served whose folder says how the embedding is made",
                where=str(self.root),
                found=made.described,
                next_step="name the pooling with --pooling, or see in OUT's reports why they are not served",
            )
        return replace(made, source=source)


def settled(
    opened: Sequence[Opened], base: str, pooling: str | None, *, earlier: SentenceEmbedding | None = None
) -> tuple[FleetEmbedding, list[Opened], list[AdapterOutcome]]:
    """The embedding of a fleet, the adapters that fit it, and the outcomes of the others.

    The hashes of an adapter whose folder says how it embeds are of that too.

    Args:
        pooling: See `FleetOptions`.
        earlier: What the fleet makes that is renewed; None where there is none.

    Raises:
        InputRefused: The folders are asked, and none says anything.
    """
    if pooling in (None, NONE) or not opened:
        return FleetEmbedding(), list(opened), []
    checkpoint = Checkpoint.open(locate(base, kind="base"))
    if pooling != AUTO:
        named = choose_head(pooling, Task.FEATURE_EXTRACTION, checkpoint=checkpoint, folders=())
        return FleetEmbedding(pooling, named.head), list(opened), []
    heads, refused = _heads_of(opened)
    gone = {outcome.name for outcome in refused}
    of_base = _head_of_base(checkpoint, is_needed=not heads)
    silent = [each for each in opened if each.entry.name not in heads.keys() | gone]
    chosen = _most(heads, of_base, n_silent=len(silent), earlier=earlier)
    fitting = []
    for each in opened:
        name = each.entry.name
        if name in heads and not equal_embeddings(heads[name].embedding, chosen.embedding):
            refused.append(refusal(name, each.entry.given, of_another_embedding(name, heads[name], chosen.embedding)))
        elif name in heads:
            hashes = with_settings(each.hashes, each.folder.path, heads[name])
            fitting.append(replace(each, hashes=hashes))
        elif name not in gone:
            fitting.append(each)
    names = tuple(each.entry.name for each in fitting if each.entry.name in heads) if chosen is not of_base else ()
    return FleetEmbedding(str(chosen.root), chosen, names), fitting, refused


def _head_of_base(checkpoint: Checkpoint, *, is_needed: bool) -> SentenceHead | None:
    """What the base's folder says; None where it says nothing that a graph makes, and adapters' do."""
    try:
        return choose_head(AUTO, Task.FEATURE_EXTRACTION, checkpoint=checkpoint, folders=()).head
    except InputRefused:
        if is_needed:
            raise
        return None


def _most(
    heads: Mapping[str, SentenceHead],
    of_base: SentenceHead | None,
    *,
    n_silent: int,
    earlier: SentenceEmbedding | None,
) -> SentenceHead:
    """The head that the fleet keeps, or that most adapters have, the base's own where that says the same."""
    every = [*heads.values(), *([of_base] * n_silent if of_base is not None else [])]
    counted = Counter(replace(head.embedding, source=None) for head in every)
    before = earlier and replace(earlier, source=None)
    made = before if before in counted else max(counted, key=counted.__getitem__)
    found = [head for head in (of_base, *heads.values()) if head is not None]
    return next(head for head in found if equal_embeddings(head.embedding, made))


def _heads_of(opened: Sequence[Opened]) -> tuple[dict[str, SentenceHead], list[AdapterOutcome]]:
    """What each adapter's own folder says, by name; and the outcomes of those whose folders say what no graph makes."""
    heads: dict[str, SentenceHead] = {}
    refused = []
    for each in opened:
        name, root = each.entry.name, sentence_root(each.folder.path)
        try:
            if root is not None:
                heads[name] = read_head(root, name)
        except LoraExportError as error:
            refused.append(refusal(name, each.entry.given, error))
    return heads, refused
