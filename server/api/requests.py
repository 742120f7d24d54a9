"""The bodies that the routes take: every field that we act on, with its limits. Nothing is coerced.

`null` means the default everywhere, as in OpenAI's specification.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOKENS = 128
MAX_BIASES = 1024
MAX_PROMPTS = 256
MAX_INPUTS = 2048  # of one request for embeddings, as in OpenAI's specification
MAX_SEQUENCES = 256  # prompts times n of one request
MAX_LOGPROBS = 20
MAX_MODEL_CHARACTERS = 4096
MAX_CANDIDATES = 256

Stop = Annotated[
    Any,
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}),
]
_IDS = {"type": "array", "items": {"type": "integer"}}
Prompt = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                _IDS,
                {"type": "array", "items": _IDS},
            ]
        }
    ),
]
Content = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        "required": ["type", "text"],
                    },
                },
            ]
        }
    ),
]
TokenIds = list[Annotated[int, Field(ge=0)]]
ModelName = Annotated[str, Field(max_length=MAX_MODEL_CHARACTERS)]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class AdapterItem(Body):
    ref: Annotated[str, Field(min_length=1, max_length=MAX_MODEL_CHARACTERS)]
    weight: float = 1.0


class MergedAdapters(Body):
    """LoRAX's. Only what is an exact weighted sum of the deltas is served; `density` has no meaning there."""

    ids: list[str] = Field(min_length=1)
    weights: list[float]
    merge_strategy: str | None = None
    density: float | None = None
    majority_sign_method: str | None = None


class LoraScale(Body):
    """llama.cpp's. Ours have names, not indices."""

    id: str
    scale: float


class RoutingItem(Body):
    """Who chooses the adapters, and among which: see `server.api.routing`."""

    mode: Literal["arrow", "gate", "semantic"]
    candidates: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=MAX_MODEL_CHARACTERS)]],
            Field(min_length=1, max_length=MAX_CANDIDATES),
        ]
        | None
    ) = None
    top_k: Annotated[int, Field(ge=1, le=MAX_CANDIDATES)] | None = None
    temperature: Annotated[float, Field(gt=0, le=100)] | None = None


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # padding against traffic analysis: changes no text


class GenerationBody(Body):
    """What chats and completions share."""

    # what answers
    model: ModelName | None = None
    adapters: list[AdapterItem] | None = None
    lora_path: ModelName | None = None
    adapter_id: ModelName | None = None
    merged_adapters: MergedAdapters | None = None
    lora: list[LoraScale] | None = None
    routing: RoutingItem | None = None
    # how tokens are drawn
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)] | None = (
        None
    )
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    # where it ends
    stop: Stop = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=MAX_STOP_TOKENS)] | None = None
    ignore_eos: bool | None = None
    # what is sent
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_routing: bool | None = None


class Message(Body):
    role: str
    content: Content = None
    name: str | None = None
    reasoning_content: str | None = None
    # Fields of turns that we cannot make; only empty ones pass.
    refusal: Any = None
    audio: Any = None
    tool_calls: Any = None
    function_call: Any = None
    tool_call_id: Any = None
    annotations: Any = None


class ChatBody(GenerationBody):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionBody(GenerationBody):
    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None


class EmbeddingsBody(Body):
    """OpenAI's. `dimensions` is there to be refused: what this base makes was not trained to be cut."""

    model: ModelName | None = None
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    add_special_tokens: bool | None = None


class TokenizeBody(Body):
    """One of prompt (vLLM), content (llama.cpp), inputs (LoRAX) or messages."""

    model: ModelName | None = None
    prompt: str | None = None
    content: str | None = None
    inputs: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    model: ModelName | None = None
    tokens: TokenIds


class ReferenceBody(Body):
    """For pin, warm and evict."""

    ref: Annotated[str, Field(min_length=1, max_length=MAX_MODEL_CHARACTERS)]


class LoadBody(Body):
    """vLLM's fields. `lora_path` is a reference of the hub, never a path."""

    # A name stands in a metric label that routers split at commas, so it has none.
    lora_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@/+*-]{0,127}$")]
    lora_path: Annotated[str, Field(min_length=1, max_length=MAX_MODEL_CHARACTERS)]
    load_inplace: bool | None = None
    pinned: bool | None = None  # SGLang's
    lora_int_id: int | None = None  # vLLM's own bookkeeping; ours is the digest
    is_3d_lora_weight: bool | None = None


class UnloadBody(Body):
    lora_name: Annotated[str, Field(min_length=1, max_length=MAX_MODEL_CHARACTERS)]
    lora_int_id: int | None = None
