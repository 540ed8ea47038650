"""What the HTTP API takes and gives: OpenAI's shapes, with the extensions that vLLM has made common.

Types are strict, since a field that is silently read as something else changes an answer. For the same
reason a field that nobody knows is refused, and so is one that is known and can't be honoured, unless
its value asks for nothing. Fields that leave the answer as it is are taken and ignored.

Reference: https://platform.openai.com/docs/api-reference/chat/create and
https://docs.vllm.ai/en/stable/serving/openai_compatible_server.html.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError, core_schema

from coordinator.request import (
    MAX_CONTINUATIONS,
    MAX_LOGPROBS,
    MAX_PENALTY,
    MAX_REPETITION_PENALTY,
    MAX_SEED,
    MAX_TEMPERATURE,
)

MAX_PROMPTS = 2048
MAX_ID_DIGITS = 10

UNKNOWN = "unknown_parameter"
UNSUPPORTED = "unsupported_parameter"
INVALID = "invalid_value"


def _refuse(problem: str) -> PydanticCustomError:
    return PydanticCustomError(INVALID, "{problem}", {"problem": problem})


class _nothing_but:
    """Of a field that can't be honoured: null and these values ask for nothing."""

    def __init__(self, *harmless: object) -> None:
        self._harmless = harmless

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": [None, *self._harmless]}

    def _check(self, value: object) -> object:
        if value is not None and value not in self._harmless:
            raise PydanticCustomError(UNSUPPORTED, "is not supported")
        return value


def _within(least: float, most: float, *, above: bool = False) -> Any:
    """What the document says of a number's range; `above`: without `least`. The engine checks it."""
    low = "exclusiveMinimum" if above else "minimum"
    return Field(json_schema_extra={low: least, "maximum": most})


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


# These are checked by hand: pydantic would name each wrong item of a long list, once for every type
# that the list may have.


def _prompts(value: object) -> list[str | list[int]]:
    """One prompt or several, as a list."""
    if isinstance(value, str) or (value and _is_token_ids(value)):
        return [value]  # type: ignore[list-item]
    if not isinstance(value, list) or not (
        all(isinstance(item, str) for item in value) or all(map(_is_token_ids, value))
    ):
        raise _refuse("is neither a text, nor token ids, nor a list of either")
    if not 0 < len(value) <= MAX_PROMPTS:
        raise _refuse(f"does not have 1 to {MAX_PROMPTS} prompts")
    return value


def _texts(value: object) -> list[str]:
    """One text or several, as a list."""
    if value is None:
        return []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise _refuse("is neither a text nor a list of texts")
    return texts


def _token_ids(value: object) -> list[int]:
    if value is None:
        return []
    if not _is_token_ids(value):
        raise _refuse("is no list of token ids")
    return value  # type: ignore[return-value]


def _biases(value: object) -> dict[int, float]:
    """By token id, which JSON has as text."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _refuse("is no object of token ids and their biases")
    for token, bias in value.items():
        if not (token.isascii() and token.isdecimal() and len(token) <= MAX_ID_DIGITS):
            raise _refuse(f"{token[:40]!r} is no token id")
        if type(bias) not in (int, float):
            raise _refuse(f"the bias of token {token} is no number")
    return {int(token): bias for token, bias in value.items()}


def _content(value: object) -> str:
    """A message's text, which may come in parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise _refuse("is neither a text nor a list of parts")
    for place, part in enumerate(value):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise _refuse(f"part {place} is no object with a type")
        if part["type"] != "text":
            raise _refuse(f"part {place} is of type {part['type'][:40]!r}; only text is supported")
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise _refuse(f"part {place} does not have a type, a text and nothing else")
    return "\n".join(part["text"] for part in value)


def _by_hand(check: Callable[[object], Any], kind: Any) -> PlainValidator:
    """`check` reads the field; `kind` is what the schema says of it."""
    return PlainValidator(check, json_schema_input_type=kind)


Prompts = Annotated[
    list[str | list[int]], _by_hand(_prompts, str | list[str] | list[int] | list[list[int]])
]
Texts = Annotated[list[str], _by_hand(_texts, str | list[str] | None)]
TokenIds = Annotated[list[int], _by_hand(_token_ids, list[int] | None)]
Biases = Annotated[dict[int, float], _by_hand(_biases, dict[str, float] | None)]
Unsupported = Annotated[Any, _nothing_but()]
Ignored = Any


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


Content = Annotated[str, _by_hand(_content, str | list[TextPart])]


class Asked(BaseModel):
    """Part of a request."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _is_known(cls, data: Any) -> Any:
        # Before pydantic's own check, which collects every such field of a body that is full of them.
        if isinstance(data, dict):
            for name in data:
                if name not in cls.model_fields:
                    raise PydanticCustomError(UNKNOWN, "is unknown", {"name": name})
        return data


# Requests


class StreamOptions(Asked):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Ignored = None


class GenerationRequest(Asked):
    """What completions and chats have in common."""

    model: str | None = None
    frequency_penalty: Annotated[float | None, _within(-MAX_PENALTY, MAX_PENALTY)] = None
    logit_bias: Biases = {}
    n: Annotated[int | None, _within(1, MAX_CONTINUATIONS)] = None
    presence_penalty: Annotated[float | None, _within(-MAX_PENALTY, MAX_PENALTY)] = None
    seed: Annotated[int | None, _within(-(2**63), MAX_SEED)] = None
    stop: Texts = []
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float | None, _within(0, MAX_TEMPERATURE)] = None
    top_p: Annotated[float | None, _within(0, 1, above=True)] = None

    # As vLLM has them.
    top_k: Annotated[int | None, _within(-1, 2**32 - 1)] = None
    min_p: Annotated[float | None, _within(0, 1)] = None
    repetition_penalty: Annotated[float | None, _within(0, MAX_REPETITION_PENALTY, above=True)] = (
        None
    )
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    stop_token_ids: TokenIds = []
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: Annotated[Any, _nothing_but(True)] = None
    prompt_logprobs: Annotated[int | None, _within(0, MAX_LOGPROBS)] = None
    priority: Annotated[int | None, _within(-(2**31), 2**31 - 1)] = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    request_id: str | None = None

    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    prediction: Ignored = None
    """What the answer may look like, to have it sooner: it does not change the answer."""

    response_format: Annotated[Any, _nothing_but({"type": "text"})] = None


class CompletionRequest(GenerationRequest):
    prompt: Prompts
    best_of: int | None = None
    echo: bool | None = None
    logprobs: Annotated[int | None, _within(0, MAX_LOGPROBS)] = None
    max_tokens: int | None = None
    suffix: Annotated[Any, _nothing_but("")] = None


class Message(Asked):
    """One message; a model's chat template decides which roles there are."""

    role: str
    content: Content
    name: str | None = None

    # Answers of the assistant that come back have these, empty.
    refusal: Unsupported = None
    annotations: Annotated[Any, _nothing_but([])] = None
    audio: Unsupported = None
    function_call: Unsupported = None
    tool_calls: Annotated[Any, _nothing_but([])] = None
    tool_call_id: Unsupported = None
    reasoning: Unsupported = None
    reasoning_content: Unsupported = None


class ChatRequest(Asked):
    """A conversation and how it is written."""

    messages: Annotated[list[Message], FailFast()]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ChatCompletionRequest(GenerationRequest, ChatRequest):
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, _within(0, MAX_LOGPROBS)] = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None

    parallel_tool_calls: Ignored = None

    audio: Unsupported = None
    function_call: Annotated[Any, _nothing_but("none")] = None
    functions: Annotated[Any, _nothing_but([])] = None
    modalities: Annotated[Any, _nothing_but(["text"])] = None
    moderation: Unsupported = None
    reasoning_effort: Unsupported = None
    tool_choice: Annotated[Any, _nothing_but("none")] = None
    tools: Annotated[Any, _nothing_but([])] = None
    verbosity: Annotated[Any, _nothing_but("medium")] = None
    web_search_options: Unsupported = None


class TokenizeRequest(Asked):
    """`prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], FailFast()] = []
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Asked):
    model: str | None = None
    tokens: TokenIds


# Answers. A field that is not set is not sent.


class CachedTokens(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens | None = None


class PromptLogprob(BaseModel):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]


class CompletionLogprobs(BaseModel):
    """Of each token; the first one of a prompt has none, since nothing comes before it."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(BaseModel):
    """The answer, and each chunk of one that is streamed."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ChatLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(ChatLogprob):
    top_logprobs: list[ChatLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob]
    refusal: None = None


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None
    token_ids: list[int] | None = None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None
    token_ids: list[int] | None = None


class ChatCompletionChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Tokens(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None


class Text(BaseModel):
    prompt: str


class Health(BaseModel):
    status: str


class Version(BaseModel):
    version: str


class ErrorBody(BaseModel):
    """`param` names the field of the request that is wrong, if one is."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    error: ErrorBody
