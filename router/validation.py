"""Checks at the edge: what a client sent becomes sampling parameters that all behind it may trust.

Every refusal is an InvalidRequest that names the field, its value and its limit.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tandem.errors import InvalidRequest
from tandem.request import PRIORITY_MAX, RequestId, Sampling, Slo, SloClass

BODY_BYTES_MAX = 8 * 1024 * 1024
STOPS_MAX = 16
STOP_CHARACTERS_MAX = 256
STOP_TOKEN_IDS_MAX = 128
LOGIT_BIAS_MAX = 1024
LOGPROBS_MAX = 20
CHOICES_EACH_MAX = 16  # `n`
CHOICES_MAX = 128  # prompts times `n`
REQUEST_ID_CHARACTERS_MAX = 128
CACHE_SALT_CHARACTERS_MAX = 256
KEY_CHARACTERS_MAX = 255
RESUME_MS_MAX = 600_000
TARGET_MS_MAX = 3_600_000
TEMPERATURE_LEAST = 1e-5  # logits divided by less leave float32; 0 is greedy
COMPLETION_MAX_TOKENS = 16  # what /v1/completions gives when nothing is asked

ANSWER_MARK = "#"  # between the id of a request with several answers and an answer's number; no client's id has it
_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:\-]*")
_SEED_MASK = (1 << 64) - 1
_SHOWN_CHARACTERS_MAX = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the served model bounds."""

    vocab_size: int
    context_tokens: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingFields:
    """Sampling as the client sent it, of the right types and not yet checked. None: not sent."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)


def show(value: object) -> str:
    """A value for an error message, cut to a length that can be read."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS_MAX else text[: _SHOWN_CHARACTERS_MAX - 3] + "..."


def check_request_id(value: str, name: str = "request_id") -> RequestId:
    """The id, when it is 1 to 128 letters, digits and . _ : - beginning with a letter or digit."""
    if len(value) > REQUEST_ID_CHARACTERS_MAX:
        raise InvalidRequest(name, f"has {len(value)} characters, at most {REQUEST_ID_CHARACTERS_MAX}")
    if not _REQUEST_ID.fullmatch(value):
        raise InvalidRequest(name, f"is {show(value)}, must be letters, digits and . _ : - after a letter or digit")
    return RequestId(value)


def check_num_choices(n: int, num_prompts: int = 1) -> int:
    """`n`, when it and the number of answers in all are within bounds."""
    _whole("n", n, 1, CHOICES_EACH_MAX)
    if n * num_prompts > CHOICES_MAX:
        raise InvalidRequest(
            "prompt", f"{num_prompts} prompts times n={n} are {n * num_prompts}, at most {CHOICES_MAX}"
        )
    return n


def check_priority(value: int) -> int:
    """The priority, when there is such a one."""
    return _whole("priority", value, 0, PRIORITY_MAX)


def check_slo(slo_class: str, ttft_target_ms: int, tpot_target_ms: int) -> Slo | None:
    """What the request is to be admitted by, when it names anything."""
    _whole("ttft_target_ms", ttft_target_ms, 0, TARGET_MS_MAX)
    _whole("tpot_target_ms", tpot_target_ms, 0, TARGET_MS_MAX)
    if slo_class not in ("", *SloClass):
        raise InvalidRequest("slo_class", f"is {show(slo_class)}, must be one of {', '.join(SloClass)}")
    if not (slo_class or ttft_target_ms or tpot_target_ms):
        return None
    return Slo(slo_class=SloClass(slo_class or SloClass.INTERACTIVE), ttft_ms=ttft_target_ms, tpot_ms=tpot_target_ms)


def check_resuming(key: str, resume_ms: int, *, num_answers: int) -> None:
    """What a client that may come back gives, when it is within bounds and the request has one answer."""
    if len(key) > KEY_CHARACTERS_MAX or not key.isascii() or (key and not key.isprintable()):
        raise InvalidRequest(
            "idempotency_key", f"is {show(key)}, must be at most {KEY_CHARACTERS_MAX} printable ASCII characters"
        )
    _whole("resume_ms", resume_ms, 0, RESUME_MS_MAX)
    if num_answers > 1 and (key or resume_ms):
        name = "idempotency_key" if key else "resume_ms"
        raise InvalidRequest(name, f"is for requests of one answer, this one asks for {num_answers}")


def check_cache_salt(value: str) -> str:
    """The salt, when it is short enough. Raises InvalidRequest."""
    if len(value) > CACHE_SALT_CHARACTERS_MAX:
        raise InvalidRequest("cache_salt", f"has {len(value)} characters, at most {CACHE_SALT_CHARACTERS_MAX}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest("cache_salt", f"has a lone surrogate at character {error.start}") from None
    return value


def check_prompt(tokens: Sequence[int], limits: Limits, name: str = "prompt") -> tuple[int, ...]:
    """The prompt's ids, when there are any, all are in the vocabulary, and the context leaves room for an answer."""
    if not tokens:
        raise InvalidRequest(name, "is empty, must have at least one token")
    if len(tokens) >= limits.context_tokens:
        raise InvalidRequest(
            name,
            f"has {len(tokens)} tokens, the model's context is {limits.context_tokens} tokens "
            f"and at least one is for the answer",
        )
    if min(tokens) < 0 or max(tokens) >= limits.vocab_size:
        position = next(at for at, each in enumerate(tokens) if not 0 <= each < limits.vocab_size)
        raise InvalidRequest(name, f"token {position} is {tokens[position]}, must be 0 to {limits.vocab_size - 1}")
    return tuple(tokens)


def check_sampling(
    fields: SamplingFields,
    *,
    limits: Limits,
    num_prompt_tokens: int,
    request_id: str,
    choice: int = 0,
    names: Mapping[str, str] | None = None,
) -> Sampling:
    """Checked sampling parameters for one answer.

    `choice` counts the answers to one prompt: each has another seed. `names` gives the names that the client used for
    our fields, for the messages. The stop strings are checked by `check_stops`.

    Raises:
        InvalidRequest: naming the first field that is out of its range.
    """
    called = names or {}
    max_tokens = _max_tokens(fields.max_tokens, limits, num_prompt_tokens, called.get("max_tokens", "max_tokens"))
    stop_ids = _stop_token_ids(fields, limits)
    logprobs_name = called.get("logprobs", "logprobs")
    return Sampling(
        temperature=_temperature(fields.temperature),
        top_k=_whole("top_k", _or(fields.top_k, 0), 0, limits.vocab_size),
        top_p=_real("top_p", fields.top_p, 1.0, 0.0, 1.0, above=True),
        min_p=_real("min_p", fields.min_p, 0.0, 0.0, 1.0),
        repetition_penalty=_real("repetition_penalty", fields.repetition_penalty, 1.0, 0.0, 2.0, above=True),
        presence_penalty=_real("presence_penalty", fields.presence_penalty, 0.0, -2.0, 2.0),
        frequency_penalty=_real("frequency_penalty", fields.frequency_penalty, 0.0, -2.0, 2.0),
        seed=_seed(fields.seed, request_id, choice),
        max_tokens=max_tokens,
        min_tokens=_whole("min_tokens", _or(fields.min_tokens, 0), 0, max_tokens),
        stop_token_ids=stop_ids,
        ignore_eos=fields.ignore_eos,
        logprobs=None if fields.logprobs is None else _whole(logprobs_name, fields.logprobs, 0, LOGPROBS_MAX),
        logit_bias=_logit_bias(fields.logit_bias, limits),
    )


def check_stops(stops: Sequence[str]) -> tuple[str, ...]:
    """The stop strings, when there are at most 16, none empty and none over 256 characters."""
    if len(stops) > STOPS_MAX:
        raise InvalidRequest("stop", f"has {len(stops)} strings, at most {STOPS_MAX}")
    for number, stop in enumerate(stops):
        if not stop:
            raise InvalidRequest(f"stop.{number}", "is empty, must have at least one character")
        if len(stop) > STOP_CHARACTERS_MAX:
            raise InvalidRequest(f"stop.{number}", f"has {len(stop)} characters, at most {STOP_CHARACTERS_MAX}")
    return tuple(stops)


def seed_of(request_id: str) -> int:
    """The seed of a request that names none: the same for the same id, on every router and in every process."""
    return int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest(), "little")


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _whole(name: str, value: int, least: int, most: int) -> int:
    if not least <= value <= most:
        raise InvalidRequest(name, f"is {show(value)}, must be {least} to {most}")
    return value


def _real(name: str, value: float | None, default: float, least: float, most: float, *, above: bool = False) -> float:
    """`above`: the least value itself is out of range. NaN is out of every range."""
    if value is None:
        return default
    if not least <= value <= most or (above and value == least):
        bounds = f"above {least:g} and at most {most:g}" if above else f"{least:g} to {most:g}"
        raise InvalidRequest(name, f"is {show(value)}, must be {bounds}")
    return float(value)


def _temperature(value: float | None) -> float:
    checked = _real("temperature", value, 1.0, 0.0, 2.0)
    if 0.0 < checked < TEMPERATURE_LEAST:
        raise InvalidRequest("temperature", f"is {show(value)}, must be 0 (greedy) or {TEMPERATURE_LEAST:g} to 2")
    return checked


def _max_tokens(value: int | None, limits: Limits, num_prompt_tokens: int, name: str) -> int:
    room = limits.context_tokens - num_prompt_tokens
    if value is None:
        return room
    if value < 1:
        raise InvalidRequest(name, f"is {show(value)}, must be at least 1")
    if value > room:
        raise InvalidRequest(
            name,
            f"is {show(value)}, but the model's context is {limits.context_tokens} tokens and the prompt has "
            f"{num_prompt_tokens}: at most {room}",
        )
    return value


def _stop_token_ids(fields: SamplingFields, limits: Limits) -> tuple[int, ...]:
    """Those asked for, and the model's ends of sequence unless they are to be ignored."""
    asked = fields.stop_token_ids
    if len(asked) > STOP_TOKEN_IDS_MAX:
        raise InvalidRequest("stop_token_ids", f"has {len(asked)} ids, at most {STOP_TOKEN_IDS_MAX}")
    for number, each in enumerate(asked):
        _whole(f"stop_token_ids.{number}", each, 0, limits.vocab_size - 1)
    ends = () if fields.ignore_eos else limits.eos_token_ids
    return tuple(dict.fromkeys((*asked, *ends)))


def _seed(value: int | None, request_id: str, choice: int) -> int:
    if value is None:
        return seed_of(request_id)
    _whole("seed", value, -(1 << 63), _SEED_MASK)
    return (value + choice) & _SEED_MASK


def _logit_bias(bias: Mapping[int, float], limits: Limits) -> tuple[tuple[int, float], ...]:
    if len(bias) > LOGIT_BIAS_MAX:
        raise InvalidRequest("logit_bias", f"has {len(bias)} entries, at most {LOGIT_BIAS_MAX}")
    for token_id, value in bias.items():
        if not 0 <= token_id < limits.vocab_size:
            raise InvalidRequest("logit_bias", f"token {show(token_id)} must be 0 to {limits.vocab_size - 1}")
        _real(f"logit_bias.{token_id}", value, 0.0, -100.0, 100.0)
    return tuple(sorted((token_id, float(value)) for token_id, value in bias.items()))
