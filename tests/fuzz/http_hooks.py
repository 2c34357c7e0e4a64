"""What schemathesis cannot read in the document: limits on two fields together. Loaded by it (SCHEMATHESIS_HOOKS).

Only what is within the schema is touched, and stays within it: what breaks the schema is sent as it was made. Answers
are kept short, so that many fit into the time.
"""

from __future__ import annotations

import os
import re
from typing import Any

import schemathesis

from router.chat import MESSAGES_MAX
from router.openai_schema import IGNORED, UNSUPPORTED

NARROW = "TANDEM_FUZZ_NARROW"
ANSWER_TOKENS = 8
PROMPT_LENGTH = 64
UNKNOWN_HEADER = "x-schemathesis-unknown-property"  # any server ignores such
_EVENT = re.compile(r"([^/]+)/[0-9]+")
ONE_ANSWER = ("idempotency-key", "x-resume-ms")


def whole(value: object, least: int, most: int) -> bool:
    """Whether it is a whole number between the two."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def written_whole(value: Any) -> Any:
    """The same value with 63.0 written as 63: to JSON Schema they are one number, the server takes only the second."""
    if isinstance(value, dict):
        return {name: written_whole(each) for name, each in value.items()}
    if isinstance(value, list):
        return [written_whole(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def fit(body: dict[str, Any], vocab_size: int, context_tokens: int) -> None:
    """Fits the fields of a request to one another."""
    most_tokens = context_tokens - 1
    for name in ("max_tokens", "max_completion_tokens"):
        if whole(body.get(name), 1, most_tokens):
            body[name] = 1 + body[name] % ANSWER_TOKENS
    newer = body.get("max_completion_tokens")
    if newer is None and body.get("max_tokens") is None:
        body["max_tokens"] = ANSWER_TOKENS
    most = body["max_tokens"] if newer is None else newer
    if whole(body.get("min_tokens"), 0, most_tokens) and whole(most, 1, ANSWER_TOKENS):
        body["min_tokens"] = min(body["min_tokens"], most)
    if isinstance(body.get("temperature"), float) and 0 < body["temperature"] < 1e-5:
        body["temperature"] = 0
    bias = body.get("logit_bias")
    if isinstance(bias, dict) and all(key.isascii() and key.isdigit() and len(key) <= 10 for key in bias):
        body["logit_bias"] = {str(int(key) % vocab_size): value for key, value in bias.items()}
    _shorten(body, vocab_size, most_tokens)


def _shorten(body: dict[str, Any], vocab_size: int, most_tokens: int) -> None:
    prompt, messages = body.get("prompt"), body.get("messages")
    if isinstance(messages, list) and len(messages) <= MESSAGES_MAX:
        body["messages"] = messages[:4]
        for message in body["messages"]:
            if isinstance(message, dict) and isinstance(message.get("content"), str):
                message["content"] = message["content"][:PROMPT_LENGTH]
            elif isinstance(message, dict) and isinstance(message.get("content"), list):
                message["content"] = [_short(part) for part in message["content"][:4]]
    if isinstance(prompt, list):
        if all(isinstance(each, str | list) for each in prompt) and len(prompt) <= 128:
            prompt = [each[:PROMPT_LENGTH] for each in prompt[:4]]
        elif all(whole(each, 0, vocab_size - 1) for each in prompt) and len(prompt) <= most_tokens:
            prompt = prompt[:PROMPT_LENGTH]
        body["prompt"] = prompt
    elif isinstance(prompt, str):
        body["prompt"] = prompt[:PROMPT_LENGTH]
    if whole(body.get("n"), 1, 16):
        body["n"] = 1 + body["n"] % 4


def _short(part: Any) -> Any:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return {**part, "text": part["text"][: PROMPT_LENGTH // 4]}
    return part


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case[Any], kwargs: dict[str, Any]) -> None:
    """Every request on its way out. What may be asked again has one answer."""
    event = case.headers.get("last-event-id")
    if isinstance(event, str) and (seen := _EVENT.fullmatch(event)):  # of an answer that may be known, and is short
        case.headers["last-event-id"] = f"{seen[1]}/0"
    body = case.body
    if not isinstance(body, dict) or context.operation is None:
        return
    limits = context.operation.schema.raw_schema["info"]["x-limits"]
    body = case.body = written_whole(body)
    fit(body, limits["vocab_size"], limits["context_tokens"])
    if any(case.headers.get(name) not in (None, "", "0", 0) for name in ONE_ANSWER):
        if whole(body.get("n"), 1, 4):
            body["n"] = 1
        if isinstance(body.get("prompt"), list) and any(isinstance(each, str | list) for each in body["prompt"]):
            body["prompt"] = body["prompt"][:1]


@schemathesis.hook
def before_load_schema(context: schemathesis.HookContext, raw_schema: dict[str, Any]) -> None:
    """Where only a part of the fields is tried: those that change no answer are left to the run that tries all."""
    if not os.environ.get(NARROW):
        return
    for name in ("ChatRequest", "CompletionRequest"):
        properties = raw_schema["components"]["schemas"][name]["properties"]
        for field in (*IGNORED, *UNSUPPORTED):
            properties.pop(field, None)


@schemathesis.hook
def filter_case(context: schemathesis.HookContext, case: schemathesis.Case[Any]) -> bool:
    """A header that nobody knows is no violation."""
    return UNKNOWN_HEADER not in case.headers
