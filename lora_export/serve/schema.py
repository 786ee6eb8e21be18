"""The bodies of requests. A field that is not here, or a value that is not, is refused by its name."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

# A field of OpenAI's API that may be sent with the value that changes nothing.
Zero = Annotated[float, Field(ge=0, le=0)]
Tokens = list[StrictInt]
Texts = StrictStr | list[StrictStr] | Tokens | list[Tokens]


class Body(BaseModel):
    """Strict: no field is ignored. `user` is taken and has no effect."""

    model_config = ConfigDict(extra="forbid")

    model: StrictStr
    user: str | None = None


class EmbeddingBody(Body):
    """`/v1/embeddings`."""

    input: Texts
    encoding_format: Literal["float", "base64"] = "float"


class ClassifyBody(Body):
    """`/v1/classify`, as vLLM's `/classify`."""

    input: Texts


class LoadBody(BaseModel):
    """`/v1/load_lora_adapter`, as vLLM's. The path is inside the folder of `--allow-runtime-adapters`."""

    model_config = ConfigDict(extra="forbid")

    lora_name: StrictStr
    lora_path: StrictStr
    load_inplace: bool = False


class UnloadBody(BaseModel):
    """`/v1/unload_lora_adapter`, as vLLM's."""

    model_config = ConfigDict(extra="forbid")

    lora_name: StrictStr
