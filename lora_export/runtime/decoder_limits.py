"""What a decoder's session can be asked for, said before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_export.contract import GATE_INPUT
from lora_export.errors import UsageProblem
from lora_export.reading import CONFIG, model_settings, size_in
from lora_export.runtime.adapter_session import AdapterSession
from lora_export.runtime.positions import n_positions

# What follows from a text's tokens.
_OF_TOKENS = {"input_ids", "attention_mask", "position_ids", "token_type_ids", GATE_INPUT}


@dataclass(frozen=True)
class DecoderLimits:
    """Of one decoder.

    Attributes:
        vocabulary: How many tokens it knows; None if its configuration does not say.
        n_positions: The most tokens of a text that it was made for; None likewise.
    """

    vocabulary: int | None
    n_positions: int | None

    @classmethod
    def of(cls, session: AdapterSession) -> DecoderLimits:
        """Of the decoder of `session`, by the configuration beside it.

        Raises:
            UsageProblem: The graph is no decoder with a cache, or takes more than tokens.
        """
        contract = session.contract
        others = [spec.name for spec in contract.inputs if spec not in contract.past and spec.name not in _OF_TOKENS]
        if not contract.past or others:
            raise UsageProblem(
                "The graph does not write texts from tokens alone",
                where=str(session.folder),
                expected="a decoder for text generation",
                found=f"a graph that takes {', '.join(others)}" if others else "a graph without a cache",
            )
        vocabulary = size_in(model_settings(session.folder), "vocab_size", where=session.folder / CONFIG)
        return cls(vocabulary, n_positions(session.folder))

    def require(self, *, max_rows: int, max_length: int, prefill_chunk: int) -> None:
        for name, value in (("max_rows", max_rows), ("max_length", max_length), ("prefill_chunk", prefill_chunk)):
            if value < 1:
                raise UsageProblem(
                    "A limit of the scheduler is out of its range", where=name, expected="at least 1", found=str(value)
                )
        if self.n_positions is not None and max_length > self.n_positions:
            raise UsageProblem(
                "The texts would be longer than the model's positions",
                where="max_length",
                expected=f"at most {self.n_positions}",
                found=str(max_length),
            )

    def require_prompt(self, prompt: Sequence[int], longest: int, max_new_tokens: int) -> None:
        if not prompt:
            raise UsageProblem("The prompt is empty", expected="at least one token, such as the model's first")
        if max_new_tokens < 1:
            raise UsageProblem(
                "Nothing is to be written", where="max_new_tokens", expected="at least 1", found=str(max_new_tokens)
            )
        if len(prompt) >= longest:
            raise UsageProblem(
                "The prompt leaves no room for a token",
                expected=f"at most {longest - 1} tokens",
                found=f"{len(prompt)} tokens",
            )
        unknown = [token for token in prompt if token < 0 or (self.vocabulary is not None and token >= self.vocabulary)]
        if unknown:
            raise UsageProblem(
                "The prompt has a token that the model does not know",
                expected=f"ids from 0 to {self.vocabulary - 1}" if self.vocabulary else "ids from 0 on",
                found=str(unknown[0]),
            )
