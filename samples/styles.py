"""The text that the decoder and its two adapters learn, and its tokenizer."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 2048
BEGIN, END, PAD = "<s>", "</s>", "<pad>"
OPENING_WORDS = (1, 4)
DOCSTRINGS, LICENCES = 400, 80
SHORTEST, LONGEST = 70, 200


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
    sklearn, torch = map(corpus.package, ("sklearn", "torch"))
    paths = corpus.files(corpus.STDLIB, "*.py", "[a-d]*/*.py", "[f-z]*/*.py")
    paths += corpus.files(sklearn, "[a-t]*/*.py") + corpus.files(torch, "nn/**/*.py", "optim/*.py")
    shuffler = random.Random(seed)
    docs = _split(corpus.docstrings(paths), shuffler, DOCSTRINGS)
    # Disclaimers in capitals would make the legal style look like the other one.
    prose = (p for p in corpus.licences() if re.match(r"[A-Z][a-z]+ [^\d(@]+$", p.text) and not _capitals(p.text))
    laws = _split(prose, shuffler, LICENCES)
    shout = Split(*(tuple(_shouted(part, shuffler)) for part in (docs.train, docs.heldout)))
    legal = Split(
        tuple(_continued(docs.train, laws.train, shuffler)),
        tuple(_continued(docs.heldout, laws.heldout, shuffler)),
    )
    # An adapter this small brings out what its base has seen, so the base sees some of each style.
    mixture = [*docs.train, *shout.train[: DOCSTRINGS // 3], *legal.train[: LICENCES // 2]]
    return Texts(Split(tuple(mixture), docs.heldout), shout, legal)


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


def _split(passages: Iterable[corpus.Passage], shuffler: random.Random, count: int) -> Split:
    """Beginnings of some passages, at most `count` to learn from and half as many held out."""
    short = [corpus.Passage(text, p.source) for p in passages if (text := _beginning(p.text))]
    short = corpus.unique(short)
    train = [p.text for p in short if not corpus.is_heldout(p.source)]
    heldout = [p.text for p in short if corpus.is_heldout(p.source)]
    shuffler.shuffle(train)
    shuffler.shuffle(heldout)
    return Split(tuple(train[:count]), tuple(heldout[: count // 2]))


def _beginning(text: str) -> str:
    """The whole sentences at the beginning that fit in `LONGEST` characters; nothing if none does."""
    found = re.match(rf"[^{{}}<>|\\_=]{{{SHORTEST - 1},{LONGEST - 1}}}\.(?=\s|$)", text)
    return found.group() if found else ""


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
