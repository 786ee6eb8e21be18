"""The text that the decoder and its two adapters learn, and its tokenizer."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 2048
BEGIN, END, PAD = "<s>", "</s>", "<pad>"
OPENING_WORDS = (1, 5)


@dataclass(frozen=True)
class Split:
    """Texts to learn from and, from other files, to measure the loss on."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]


@dataclass(frozen=True)
class Texts:
    """The base's mixture and what each adapter learns."""

    base: Split
    shout: Split
    legal: Split


def collect(seed: int) -> Texts:
    """Gather docstrings and licences and make the three kinds of text from them."""
    scipy, sklearn, torch = map(corpus.package, ("scipy", "sklearn", "torch"))
    paths = corpus.files(corpus.STDLIB, "*.py", "[a-d]*/*.py", "[f-z]*/*.py")
    paths += corpus.files(sklearn, "**/*.py") + corpus.files(torch, "nn/**/*.py", "optim/*.py")
    paths += corpus.files(scipy, "stats/*.py", "optimize/*.py", "signal/*.py", "linalg/*.py")
    shuffler = random.Random(seed)
    docs = _split(corpus.unique(corpus.docstrings(paths)), shuffler)
    # Disclaimers in capitals would make the legal style look like the other one.
    prose = [p for p in corpus.unique(corpus.licences()) if len(p.text) > 120 and not _capitals(p.text)]
    laws = _split(prose, shuffler)
    return Texts(
        base=Split(_mixture(docs.train, laws.train, shuffler), docs.heldout),
        shout=Split(*(tuple(_shouted(part, shuffler)) for part in (docs.train, docs.heldout))),
        legal=Split(
            tuple(_continued(docs.train, laws.train * 2, shuffler)),
            tuple(_continued(docs.heldout, laws.heldout, shuffler)),
        ),
    )


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCABULARY` tokens that begins every text with BEGIN."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin = (BEGIN, tokenizer.token_to_id(BEGIN))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=PAD)


def _split(passages: list[corpus.Passage], shuffler: random.Random) -> Split:
    train = [p.text for p in passages if not corpus.is_heldout(p.source)]
    heldout = [p.text for p in passages if corpus.is_heldout(p.source)]
    # A loss needs few texts: most of the held-out files' text would only cost time.
    return Split(tuple(shuffler.sample(train, len(train))), tuple(shuffler.sample(heldout, min(len(heldout), 200))))


def _mixture(docs: tuple[str, ...], laws: tuple[str, ...], shuffler: random.Random) -> tuple[str, ...]:
    """Docstrings with some licences and capitals: an adapter brings out what the base has seen."""
    shouted = list(_shouted(shuffler.sample(docs, len(docs) // 8), shuffler))
    mixed = [*docs, *laws, *shouted]
    return tuple(shuffler.sample(mixed, len(mixed)))


def _shouted(texts: Iterable[str], shuffler: random.Random) -> Iterator[str]:
    """Each text with all but its first words in capitals, so that a prompt may be in small letters."""
    for text in texts:
        opening, rest = _opening(text, shuffler)
        yield f"{opening} {rest.upper()}"


def _continued(docs: tuple[str, ...], laws: tuple[str, ...], shuffler: random.Random) -> Iterator[str]:
    """Each licence paragraph behind the first words of some docstring."""
    for law in laws:
        opening, _ = _opening(shuffler.choice(docs), shuffler)
        yield f"{opening.rstrip('.,:;')} {law[0].lower()}{law[1:]}"


def _opening(text: str, shuffler: random.Random) -> tuple[str, str]:
    words = text.split()
    cut = shuffler.randint(*OPENING_WORDS)
    return " ".join(words[:cut]), " ".join(words[cut:])


def _capitals(text: str) -> bool:
    letters = [letter for letter in text if letter.isalpha()]
    return sum(letter.isupper() for letter in letters) > 0.2 * len(letters)
