"""A text that comes token by token is the text of all its tokens, cut at a stop string."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lora_export.runtime.text_stream import TextStream

WORDS = ["a", "b", "ab", "ba", "é", "語", "🙂", ".", "<s>", "aab", "bb", "\n"]


def byte_level() -> Tokenizer:
    """One token a byte, so that many a token is a part of a character."""
    vocabulary = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return tokenizer


def metaspace() -> Tokenizer:
    """As Llama's: a word's token brings the space before it, which the text's first word loses."""
    tokenizer = Tokenizer(models.BPE(vocab={"▁": 0, **{f"▁{w}": n for n, w in enumerate("abc", 1)}, "x": 4}, merges=[]))
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


BYTES, SPACED = byte_level(), metaspace()


def written(decode, ids: list[int], stop: list[str]) -> tuple[list[str], bool]:
    stream, parts = TextStream(decode, stop), []
    for token in ids:
        parts.append(stream.add(token))
        if stream.is_stopped:
            return parts, True
    return [*parts, stream.end()], stream.is_stopped


@given(
    st.lists(st.sampled_from(WORDS), max_size=12).map("".join),
    st.lists(st.sampled_from(["aab", "bba", "🙂.", "語é", "a"]), max_size=2),
)
@settings(max_examples=200, deadline=None)
def test_a_text_of_bytes(text, stop):
    parts, is_stopped = written(BYTES.decode, BYTES.encode(text).ids, stop)
    places = [text.find(each) for each in stop if each in text]
    assert "".join(parts) == (text[: min(places)] if places else text)
    assert is_stopped == bool(places)
    assert "�" not in "".join(parts)


@given(st.lists(st.integers(0, 4), max_size=10))
@settings(max_examples=100, deadline=None)
def test_a_text_of_words(ids):
    assert "".join(written(SPACED.decode, ids, [])[0]) == SPACED.decode(ids)


def test_what_is_certain_is_given_at_once():
    assert written(BYTES.decode, BYTES.encode("aé").ids, [])[0] == ["a", "", "é", ""]
    assert written(BYTES.decode, BYTES.encode("xabyabc").ids, ["abc"]) == (["x", "", "", "aby", "", "", ""], True)


def test_bytes_that_are_no_character_are_said_at_the_end():
    ids = BYTES.encode("aé").ids[:-1]
    assert written(BYTES.decode, ids, [])[0] == ["a", "", "�"]
