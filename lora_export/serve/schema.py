"""The bodies of requests. A field that is not here, or a value that is not, is refused by its name."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt, StrictStr, model_validator

from lora_export.runtime.sampling import LEAST_PENALTY, LEAST_TEMPERATURE, MOST_PENALTY, MOST_TEMPERATURE


def _whole(text: str) -> str:
    """JSON can write half of a surrogate pair, which is no text: no tokenizer takes it, and no answer can say it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it has half of a surrogate pair, which is no text") from None
    return text


def _no_rounding_error(temperature: float) -> float:
    if 0 < temperature < LEAST_TEMPERATURE:
        raise ValueError(f"it must be 0, or at least {LEAST_TEMPERATURE:g}")
    return temperature


Text = Annotated[StrictStr, AfterValidator(_whole)]

# A field of OpenAI's API that may be sent with the value that changes nothing.
Zero = Annotated[float, Field(ge=0, le=0)]
# A list ends at its first wrong element: a message for each of a million would hold up all other requests.
_FIRST = Field(fail_fast=True)
Tokens = Annotated[list[StrictInt], _FIRST]
Texts = Text | Annotated[list[Text], _FIRST] | Tokens | Annotated[list[Tokens], _FIRST]


class Strict(BaseModel):
    """No field is ignored."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _with_one_unknown_field(cls, given: object) -> object:
        """Without the second field that is not known and those after it: the first is named, however many there are."""
        if not isinstance(given, dict):
            return given
        unknown = [name for name in given if name not in cls.model_fields]
        return {name: value for name, value in given.items() if name in cls.model_fields or name == unknown[0]}


class Body(Strict):
    """Of every request to a model. `user` is taken and has no effect."""

    model: Text
    user: Text | None = None


class EmbeddingBody(Body):
    """`/v1/embeddings`."""

    input: Texts
    encoding_format: Literal["float", "base64"] = "float"


class ClassifyBody(Body):
    """`/v1/classify`, as vLLM's `/classify`."""

    input: Texts


class QuestionBody(Body):
    """`/v1/question-answering`, as the inputs of Transformers' pipeline."""

    question: Text
    context: Text


class GapsBody(Body):
    """`/v1/fill-mask`."""

    input: Text | Annotated[list[Text], _FIRST]
    top_k: Annotated[int, Field(ge=1, le=100)] = 5


class SpeechBody(Body):
    """`/v1/audio/transcriptions`, beside its `file`; what is not given is the model's own choice."""

    language: Text | None = None
    prompt: Literal[""] | None = None
    response_format: Literal["json", "text", "verbose_json"] = "json"
    temperature: Annotated[float, AfterValidator(_no_rounding_error), Field(ge=0, le=1)] | None = None
    stream: bool = False


class TranslationBody(Body):
    """`/v1/audio/translations`, beside its `file`."""

    prompt: Literal[""] | None = None
    response_format: Literal["json", "text", "verbose_json"] = "json"
    temperature: Annotated[float, AfterValidator(_no_rounding_error), Field(ge=0, le=1)] | None = None


class Document(Strict):
    """A text, as an object."""

    text: Text


class RerankBody(Body):
    """`/v1/rerank`, as Jina's and vLLM's."""

    query: Text
    documents: Annotated[list[Text | Document], _FIRST]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = True


class StreamOptions(Strict):
    """Whether a stream ends with the numbers of tokens."""

    include_usage: bool = False


class WritingBody(Body):
    """What `/v1/completions` and `/v1/chat/completions` have in common.

    What is left out is as the export's `generation_config.json` says: greedy, unless it samples.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, AfterValidator(_no_rounding_error), Field(ge=0, le=MOST_TEMPERATURE)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    repetition_penalty: Annotated[float, Field(ge=LEAST_PENALTY, le=MOST_PENALTY)] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: None = None


class CompletionBody(WritingBody):
    """`/v1/completions`."""

    prompt: Texts
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], _FIRST]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class TextFormat(Strict):
    """The only form of answers."""

    type: Literal["text"]


class ChatBody(WritingBody):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Message], _FIRST, Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Literal[False] | None = None
    response_format: TextFormat | None = None


class LoadBody(Strict):
    """`/v1/load_lora_adapter`, as vLLM's. The path is inside the folder of `--allow-runtime-adapters`."""

    lora_name: Text
    lora_path: Text
    load_inplace: bool = False


class UnloadBody(Strict):
    """`/v1/unload_lora_adapter`, as vLLM's."""

    lora_name: Text
