"""Bodies with very many mistakes are refused at the first: a message for each would take seconds."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from lora_export.serve.schema import ChatBody, CompletionBody, EmbeddingBody

MANY = [{}] * 100_000


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (EmbeddingBody, {"input": MANY}),
        (EmbeddingBody, {"input": [MANY]}),
        (CompletionBody, {"prompt": [[1, *MANY]]}),
        (ChatBody, {"messages": MANY}),
        (ChatBody, {"messages": [{"role": "user", "content": MANY}]}),
        (EmbeddingBody, {"input": "x", **{f"field{number}": 0 for number in range(100_000)}}),
    ],
    ids=["texts", "lists", "tokens", "messages", "parts", "fields"],
)
def test_few_mistakes_are_counted(body, fields):
    with pytest.raises(ValidationError) as found:
        body(model="x", **fields)
    assert found.value.error_count() <= 8


def test_the_first_field_that_is_not_known_is_named():
    with pytest.raises(ValidationError, match="tools"):
        ChatBody(model="x", messages=[{"role": "user", "content": "x"}], tools=[])
