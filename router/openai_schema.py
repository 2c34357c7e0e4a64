"""What clients of the OpenAI API may send, and which of its fields are ignored, refused or unknown here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from router.chat import check_num_messages, check_role, text_of_content
from router.validation import COMPLETION_MAX_TOKENS, LOGIT_BIAS_MAX, SamplingFields, show
from tandem.errors import InvalidRequest

# Fields that say something about the client and nothing about the answer.
IGNORED = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention", "parallel_tool_calls",
    }
)  # fmt: skip

# Fields that would change the answer in a way that is not supported -> the values that change nothing (null never
# does). Everything else is refused by name: an answer that silently lacks what was asked for is worse than an error.
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "prompt_logprobs": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "logits_processors": ([],),
    "truncate_prompt_tokens": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "detokenize": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "mm_processor_kwargs": (),
    "logit_processors": ([],),
}

# Names that pydantic puts into the place of an error for the branches of a union.
_BRANCHES = ("str", "int", "float", "bool", "none")

# Lists stop at their first wrong item: millions of errors would take minutes and gigabytes to tell.
_Ids = Annotated[list[int], Field(fail_fast=True)]
_Texts = Annotated[list[str], Field(fail_fast=True)]

_Request = TypeVar("_Request", bound="CommonRequest")


class StreamOptions(BaseModel):
    """How a stream ends."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None


class CommonRequest(BaseModel):
    """The fields that both kinds of completions take; beyond OpenAI's, those that vLLM added."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str = Field(default="", description="The model's id; may be left out.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    stop: str | _Texts | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, object] | None = None  # its values are checked one by one, see _bias
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: _Ids | None = None
    ignore_eos: bool | None = None
    priority: int | None = Field(
        default=None, description="0 (default) to 3: higher ones are placed first, and others make room for them."
    )
    cache_salt: str | None = Field(
        default=None, description="Prefixes are shared only among requests of the same salt, within those of the key."
    )
    slo_class: str | None = Field(
        default=None,
        description="When a target below would be missed: `interactive` (default) is refused, `sheddable` the more "
        "probably the later it would be, `batch` waits.",
    )
    ttft_target_ms: int | None = Field(default=None, description="Until the first token; 0: no target.")
    tpot_target_ms: int | None = Field(default=None, description="Between two tokens on average; 0: no target.")
    return_token_ids: bool | None = Field(default=None, description="Adds `token_ids` to each choice.")

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling_fields(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingFields:
        """The sampling part, of the right types and not yet checked."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingFields(
            temperature=self.temperature,
            top_k=0 if self.top_k == -1 else self.top_k,  # vLLM's clients say -1 for "off"
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            stop=[each for each in stop if each] if isinstance(self.stop, str) else stop,
            stop_token_ids=self.stop_token_ids or (),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            logit_bias=_bias(self.logit_bias or {}),
        )


class ChatMessage(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: str | list[object] | None = None
    name: str | None = None


class ChatRequest(CommonRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(fail_fast=True)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def fields(self) -> SamplingFields:
        """Sampling; `max_completion_tokens` is the newer name of `max_tokens`."""
        newer = self.max_completion_tokens
        if not self.logprobs and self.top_logprobs:
            raise InvalidRequest("top_logprobs", f"is {self.top_logprobs}, which needs logprobs to be true")
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.sampling_fields(max_tokens=self.max_tokens if newer is None else newer, logprobs=logprobs)

    def names(self) -> dict[str, str]:
        """What the client calls our fields."""
        tokens = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        return {"max_tokens": tokens, "logprobs": "top_logprobs", "prompt": "messages"}

    def turns(self) -> list[dict[str, str]]:
        """The messages for the chat template, as text. Raises InvalidRequest naming the message."""
        check_num_messages(len(self.messages))
        return [_turn(number, message) for number, message in enumerate(self.messages)]


class CompletionRequest(CommonRequest):
    """POST /v1/completions."""

    prompt: str | _Texts | _Ids | Annotated[list[_Ids], Field(fail_fast=True)]
    logprobs: int | None = None

    def fields(self) -> SamplingFields:
        """Sampling; OpenAI's default of 16 tokens holds."""
        tokens = COMPLETION_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        return self.sampling_fields(max_tokens=tokens, logprobs=self.logprobs)

    def prompts(self) -> list[str | list[int]]:
        """Each prompt: a text, or its token ids. Raises InvalidRequest when there is none."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise InvalidRequest("prompt", "is empty, must have at least one token")
        ids = [each for each in self.prompt if isinstance(each, int)]
        return [ids] if ids else [each for each in self.prompt if not isinstance(each, int)]


def parse(kind: type[_Request], body: bytes) -> _Request:
    """The request in `body`.

    Raises:
        InvalidRequest: the JSON is broken, a field has a wrong type, is unknown, or is not supported.
    """
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise _first(error) from None
    _check_extra(request.model_extra or {}, request.n)
    return request


def _check_extra(extra: Mapping[str, object], n: int | None) -> None:
    for name, value in extra.items():
        if value is None or name in IGNORED:
            continue
        neutral = UNSUPPORTED.get(name)
        if neutral is None:
            raise InvalidRequest(show(name).strip("'"), "is not a field of this request")
        same = any(type(value) is type(each) and value == each for each in neutral)  # 0 is not false
        if not same and not (name == "best_of" and type(value) is int and value == n):
            raise InvalidRequest(name, f"is {show(value)}, which is not supported")


def _turn(number: int, message: ChatMessage) -> dict[str, str]:
    place = f"messages.{number}"
    for name in ("tool_calls", "function_call", "audio"):
        if (message.model_extra or {}).get(name):
            raise InvalidRequest(f"{place}.{name}", "is not supported")
    turn = {
        "role": check_role(message.role, f"{place}.role"),
        "content": text_of_content(message.content, f"{place}.content"),
    }
    return turn | ({"name": message.name} if message.name is not None else {})


def _bias(bias: Mapping[str, object]) -> dict[int, float]:
    if len(bias) > LOGIT_BIAS_MAX:
        raise InvalidRequest("logit_bias", f"has {len(bias)} entries, at most {LOGIT_BIAS_MAX}")
    found = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise InvalidRequest("logit_bias", f"key {show(key)} must be a token id")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidRequest(f"logit_bias.{key}", f"is {show(value)}, must be a number")
        found[int(key)] = value
    return found


def _first(error: ValidationError) -> InvalidRequest:
    """The first wrong field; the branches of a union that all failed become one sentence."""
    errors = error.errors(include_url=False, include_context=False)
    if errors[0]["type"] == "json_invalid":
        return InvalidRequest("body", f"is not JSON: {errors[0]['msg'].removeprefix('Invalid JSON: ')}")
    # Of a union the branch that got furthest is meant: of a list of token ids the first that is none, not the list.
    same = [each for each in errors if each["loc"][:1] == errors[0]["loc"][:1]]
    first = max(same, key=lambda each: [part for part in each["loc"] if isinstance(part, int)])
    place = _place(first["loc"])
    messages = dict.fromkeys(each["msg"] for each in same if _place(each["loc"]) == place)
    if first["type"] == "missing":
        return InvalidRequest(place, "is missing")
    wanted = " or ".join(message.removeprefix("Input should be ") for message in messages)
    return InvalidRequest(place or "body", f"is {show(first['input'])}, must be {wanted}")


def _place(location: tuple[int | str, ...]) -> str:
    parts = [str(part) for part in location if isinstance(part, int) or not ("[" in part or part in _BRANCHES)]
    return ".".join(parts)
