"""The OpenAPI document of the HTTP API: what may be sent, with its limits, and every answer that may come.

It says no less and no more than the server does, as far as JSON Schema can: limits on two fields together (an answer
must fit the context beside its prompt, for instance) are in the descriptions. tests/fuzz holds the server to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI

from router.chat import MESSAGES_MAX, ROLES
from router.openai_schema import IGNORED, UNSUPPORTED, ChatRequest, CommonRequest, CompletionRequest
from router.openai_stream import EVENT_ID_MARK, EVENT_INDEX_DIGITS_MAX
from router.validation import (
    BODY_BYTES_MAX,
    CACHE_SALT_CHARACTERS_MAX,
    CHOICES_EACH_MAX,
    CHOICES_MAX,
    KEY_CHARACTERS_MAX,
    LOGIT_BIAS_MAX,
    LOGPROBS_MAX,
    REQUEST_ID_CHARACTERS_MAX,
    RESUME_MS_MAX,
    STOP_CHARACTERS_MAX,
    STOP_TOKEN_IDS_MAX,
    STOPS_MAX,
    TARGET_MS_MAX,
)
from tandem.errors import ERRORS
from tandem.request import PRIORITY_MAX, FinishReason, SloClass

Schema = dict[str, Any]

ERROR = "#/components/schemas/Error"
CLIENT_CLOSED = 499  # nobody is left to read it
# What any request may be answered with: the last two before its path is known.
EVERYWHERE = {
    408: "The head or the body did not come in time.",
    431: "The head is larger than 64 KiB.",
    500: "A mistake of the server's own, or the model gives no finite logits for the request.",
    503: "No worker can serve the request now, or too many connections are open.",
}
KEYS = {
    401: "The cluster asks for API keys, and the request shows none that is good.",
    403: "The API key is good, but not for this.",
}
COMPLETIONS = {
    **KEYS,
    400: "A field is wrong: `param` names it, the message its value and its limit.",
    404: "Another model than the one served, or no stream of that id is known.",
    409: "The id is in use, or another router has taken the request over.",
    413: f"The body has more than {BODY_BYTES_MAX} bytes.",
    429: "The cluster is over its capacity: come again after `Retry-After` seconds.",
    502: "The request was placed again and again in vain; the message names the last failure.",
    504: "The request's deadline is over.",
}
assert {error.http_status for error in ERRORS.values()} - {CLIENT_CLOSED} <= {*EVERYWHERE, *COMPLETIONS}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLimits:
    """What the served model bounds."""

    id: str
    vocab_size: int
    context_tokens: int


def document_of(app: FastAPI, limits: ModelLimits) -> Schema:
    """The document of `app`: FastAPI's own, completed by what handlers that read and write bytes themselves do."""
    document: Schema = FastAPI.openapi(app)
    document["info"]["x-limits"] = {"vocab_size": limits.vocab_size, "context_tokens": limits.context_tokens}
    paths, schemas = document["paths"], _answers()
    for path, kind, answer in (
        ("/v1/chat/completions", ChatRequest, "ChatCompletion"),
        ("/v1/completions", CompletionRequest, "Completion"),
    ):
        operation = paths[path]["post"]
        body, inner = _request(kind, limits)
        schemas |= {**inner, kind.__name__: body}
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
        operation["requestBody"] = {"required": True, "content": content}
        operation["parameters"] = [*_HEADERS]
        ok = _json(f"#/components/schemas/{answer}", "The answer; with `stream` as server-sent events.")
        ok["content"]["text/event-stream"] = {"schema": {"$ref": "#/components/schemas/Event"}}
        ok["headers"] = {"x-request-id": {"schema": {"type": "string"}, "required": True}}
        operation["responses"] = {"200": ok, **_errors(COMPLETIONS)}
    _plain(paths, "/v1/models", "ModelList", KEYS)
    _plain(paths, "/v1/models/{model_id}", "Model", {**KEYS, 404: COMPLETIONS[404]})
    for path in ("/live", "/ready", "/health"):
        _plain(paths, path, "Health")
    for path in ("/ready", "/health"):
        why = "Requests cannot be served now; `reason` says why. Or too many connections are open."
        either: Schema = {"anyOf": [{"$ref": "#/components/schemas/Health"}, {"$ref": ERROR}]}
        content = {"application/json": {"schema": either}}
        paths[path]["get"]["responses"]["503"] = {"description": why, "content": content}
    _plain(paths, "/metrics", "Health", KEYS)
    text = {"description": "In Prometheus' text format.", "content": {"text/plain": {"schema": {"type": "string"}}}}
    paths["/metrics"]["get"]["responses"]["200"] = text
    document["components"] = {"schemas": {**document.get("components", {}).get("schemas", {}), **schemas}}
    for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's own checks: nothing is left to them
        document["components"]["schemas"].pop(unused, None)
    return document


def _plain(paths: Mapping[str, Any], path: str, answer: str, errors: Mapping[int, str] | None = None) -> None:
    ok = _json(f"#/components/schemas/{answer}", "As asked.")
    paths[path]["get"]["responses"] = {"200": ok, **_errors(errors or {})}


def _errors(more: Mapping[int, str]) -> Schema:
    found = {}
    for status, why in sorted({**more, **EVERYWHERE}.items()):
        found[str(status)] = _json(ERROR, why)
    if HTTPStatus.TOO_MANY_REQUESTS in more:
        seconds = {"schema": {"type": "integer", "minimum": 1}, "required": True}
        found["429"]["headers"] = {"retry-after": seconds, "retry-after-ms": seconds}
    return found


def _json(reference: str, description: str) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": {"$ref": reference}}}}


# ---- what may be sent ----------------------------------------------------------------------------------------------

_OWN_ID = rf"[A-Za-z0-9][A-Za-z0-9._:\-]{{0,{REQUEST_ID_CHARACTERS_MAX - 1}}}"
_ID = f"^({_OWN_ID})?$"
_EVENT_ID = f"^({_OWN_ID}{EVENT_ID_MARK}[0-9]{{1,{EVENT_INDEX_DIGITS_MAX}}})?$"
_HEADERS = (
    {
        "name": "x-request-id",
        "in": "header",
        "description": "The request's id: unique while it is known. Without it the router makes one.",
        "schema": {"type": "string", "pattern": _ID},
    },
    {
        "name": "idempotency-key",
        "in": "header",
        "description": "The same request under the same key is answered once, and then from what is kept. One answer. "
        "With last-event-id: that of the request whose stream it was, else it is not found.",
        "schema": {"type": "string", "pattern": rf"^[ -~]{{0,{KEY_CHARACTERS_MAX}}}$"},
    },
    {
        "name": "x-resume-ms",
        "in": "header",
        "description": f"So long the request goes on when its client is cut off; at most {RESUME_MS_MAX}. One answer.",
        "schema": {"type": "integer", "minimum": 0, "maximum": RESUME_MS_MAX},
    },
    {
        "name": "last-event-id",
        "in": "header",
        "description": "The id of the last event seen of a stream that was cut off: its rest is sent, whatever the "
        "body asks for.",
        "schema": {"type": "string", "pattern": _EVENT_ID},
    },
)


def _request(kind: type[CommonRequest], limits: ModelLimits) -> tuple[Schema, dict[str, Schema]]:
    """The body's schema, and the schemas that it refers to."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    inner: dict[str, Schema] = schema.pop("$defs", {})
    properties = schema["properties"]
    for name, bounds in _bounds(limits).items():
        if name in properties:
            _bound(properties[name], bounds)
    properties |= {name: {"description": "Ignored."} for name in sorted(IGNORED)}
    for name, neutral in sorted(UNSUPPORTED.items()):
        properties[name] = {"enum": [None, *neutral], "description": "Not supported; these values change nothing."}
    # Any field may be null: that asks for nothing. One that is not known may be nothing else.
    schema["additionalProperties"] = {"type": "null"}
    if kind is ChatRequest:
        _complete_chat(schema, inner)
    return schema, inner


def _bounds(limits: ModelLimits) -> dict[str, Schema]:
    """Limits by field; each goes to the branch of its type."""
    token = {"minimum": 0, "maximum": limits.vocab_size - 1}
    answer = {"minimum": 1, "maximum": limits.context_tokens - 1}
    room = "With the prompt it must fit the context."
    prompt = {"minItems": 1, "maxItems": limits.context_tokens - 1}
    return {
        "model": {"enum": ["", limits.id]},
        "n": {"minimum": 1, "maximum": CHOICES_EACH_MAX, "description": f"Times prompts at most {CHOICES_MAX}."},
        "temperature": {"minimum": 0, "maximum": 2, "description": "0 is greedy; else at least 0.00001."},
        "top_p": {"exclusiveMinimum": 0, "maximum": 1},
        "min_p": {"minimum": 0, "maximum": 1},
        "top_k": {"minimum": -1, "maximum": limits.vocab_size, "description": "0 and -1 are off."},
        "presence_penalty": {"minimum": -2, "maximum": 2},
        "frequency_penalty": {"minimum": -2, "maximum": 2},
        "repetition_penalty": {"exclusiveMinimum": 0, "maximum": 2},
        "slo_class": {"enum": ["", *SloClass]},
        "ttft_target_ms": {"minimum": 0, "maximum": TARGET_MS_MAX},
        "tpot_target_ms": {"minimum": 0, "maximum": TARGET_MS_MAX},
        "cache_salt": {"maxLength": CACHE_SALT_CHARACTERS_MAX},
        "seed": {"minimum": -(1 << 63), "maximum": (1 << 64) - 1},
        "max_tokens": {**answer, "description": room},
        "max_completion_tokens": {**answer, "description": f"The newer name of max_tokens, which it beats. {room}"},
        "min_tokens": {"minimum": 0, "maximum": limits.context_tokens - 1, "description": "At most max_tokens."},
        "stop": {
            "string": {"maxLength": STOP_CHARACTERS_MAX},
            "array": {"maxItems": STOPS_MAX, "items": {"minLength": 1, "maxLength": STOP_CHARACTERS_MAX}},
        },
        "stop_token_ids": {"array": {"maxItems": STOP_TOKEN_IDS_MAX, "items": token}},
        "logprobs": {"integer": {"minimum": 0, "maximum": LOGPROBS_MAX}},
        "top_logprobs": {"minimum": 0, "maximum": LOGPROBS_MAX, "description": "Needs logprobs."},
        "logit_bias": {
            "maxProperties": LOGIT_BIAS_MAX,
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "description": f"By token id, at most {limits.vocab_size - 1}.",
        },
        "priority": {"minimum": 0, "maximum": PRIORITY_MAX},
        "messages": {"minItems": 1, "maxItems": MESSAGES_MAX},
        "prompt": {
            "string": {"minLength": 1},
            "array of integer": {**prompt, "items": token},
            "array of string": {"minItems": 1, "maxItems": CHOICES_MAX, "items": {"minLength": 1}},
            "array of array": {"minItems": 1, "maxItems": CHOICES_MAX, "items": {**prompt, "items": token}},
        },
    }


def _bound(field: Schema, bounds: Schema) -> None:
    """Adds the limits to the field, or to the branches of its union that they are for."""
    branches = [each for each in field.get("anyOf", [field]) if each.get("type") != "null"]
    for branch in branches:
        kind = branch.get("type", "")
        items = branch["items"].get("type", "") if kind == "array" else ""
        own = bounds.get(f"{kind} of {items}", bounds.get(kind))
        named = own if isinstance(own, dict) else {} if _by_type(bounds) else bounds
        _merge(branch, named)


def _by_type(bounds: Schema) -> bool:
    return all(name.split()[0] in ("string", "array", "integer") for name in bounds)


def _merge(schema: Schema, more: Mapping[str, Any]) -> None:
    for name, value in more.items():
        if name == "items" and isinstance(schema.get("items"), dict):
            _merge(schema["items"], value)
        else:
            schema[name] = value


def _complete_chat(schema: Schema, inner: dict[str, Schema]) -> None:
    part = {
        "type": "object",
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        "required": ["type", "text"],
    }
    message = inner["ChatMessage"]["properties"]
    message["role"]["enum"] = [*ROLES]
    for branch in message["content"]["anyOf"]:
        if branch.get("type") == "array":
            branch["items"] = part
    nothing: Schema = {
        "enum": [None, False, 0, "", [], {}],
        "description": "Not supported; these values change nothing.",
    }
    message |= {name: nothing for name in ("tool_calls", "function_call", "audio")}
    if_top = {"properties": {"top_logprobs": {"type": "integer", "minimum": 1}}, "required": ["top_logprobs"]}
    then_logprobs = {"properties": {"logprobs": {"const": True}}, "required": ["logprobs"]}
    schema |= {"if": if_top, "then": then_logprobs}


# ---- what is answered ----------------------------------------------------------------------------------------------


def _object(**properties: Schema) -> Schema:
    """An object that has just these."""
    return {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    }


def _answers() -> dict[str, Schema]:
    text, number, whole = {"type": "string"}, {"type": "number"}, {"type": "integer", "minimum": 0}
    maybe_text, maybe_number = {"type": ["string", "null"]}, {"type": ["number", "null"]}

    def listed(items: Schema) -> Schema:
        return {"type": "array", "items": items}

    error = _object(message=text, type=text, param=maybe_text, code=text)
    error["properties"]["type"] = {"enum": sorted({each.openai_type for each in ERRORS.values()})}
    spelled: dict[str, Schema] = {"token": text, "logprob": maybe_number, "bytes": listed(whole)}
    chat_logprobs = _object(
        content=listed(_object(**spelled, top_logprobs=listed(_object(**spelled)))), refusal={"type": "null"}
    )
    logprobs = _object(
        tokens=listed(text),
        token_logprobs=listed(maybe_number),
        top_logprobs=listed({"type": "object", "additionalProperties": maybe_number}),
        text_offset=listed(whole),
    )
    return {
        "Error": _object(error=error),
        "Event": {
            "type": "object",
            "properties": {
                "data": {"type": "string", "description": "JSON: a chunk of the answer, or an Error. Last: [DONE]."},
                "id": {"type": "string", "description": "For Last-Event-ID, where the stream can be resumed."},
            },
            "required": ["data"],
        },
        "Health": {"type": "object", "properties": {"status": text, "reason": text}, "required": ["status"]},
        "Model": _object(id=text, object={"const": "model"}, created=whole, owned_by=text, max_model_len=whole),
        "ModelList": _object(object={"const": "list"}, data=listed({"$ref": "#/components/schemas/Model"})),
        "Usage": _object(
            prompt_tokens=whole,
            completion_tokens=whole,
            total_tokens=whole,
            prompt_tokens_details=_object(cached_tokens=whole),
        ),
        "ChatCompletion": _completion(
            "chat.completion", "message", _object(role={"const": "assistant"}, content=text), chat_logprobs, number
        ),
        "Completion": _completion("text_completion", "text", text, logprobs, number),
    }


def _completion(kind: str, name: str, content: Schema, logprobs: Schema, number: Schema) -> Schema:
    whole = {"type": "integer", "minimum": 0}
    choice = _object(
        index=whole,
        **{name: content},
        logprobs={"anyOf": [logprobs, {"type": "null"}]},
        finish_reason={"enum": [reason.value for reason in FinishReason]},
        stop_reason={"type": ["string", "integer", "null"]},
    )
    choice["properties"]["token_ids"] = {"type": "array", "items": whole}
    return _object(
        id={"type": "string"},
        object={"const": kind},
        created=number,
        model={"type": "string"},
        choices={"type": "array", "items": choice},
        usage={"$ref": "#/components/schemas/Usage"},
    )
