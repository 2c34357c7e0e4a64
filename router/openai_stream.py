"""The bytes of OpenAI's replies: whole answers and events of streams, put together without a model object a token."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from router.answer import Answers, Piece
from router.tokenizer import Tokenizer
from tandem.errors import InvalidRequest, TandemError
from tandem.request import FinishReason, Token

DONE = b"data: [DONE]\n\n"
EVENT_ID_MARK = "/"  # no request's id has it
EVENT_INDEX_DIGITS_MAX = 9
LEAST_LOGPROB = -9999.0  # JSON has no infinity


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyForm:
    """What one reply looks like."""

    model: str
    created_s: int
    chat: bool
    logprobs: bool
    token_ids: bool
    include_usage: bool
    stream: bool

    @classmethod
    def kept(cls, form: Mapping[str, Any]) -> ReplyForm:
        """The form as it was kept with the request."""
        return cls(**{each.name: form[each.name] for each in fields(cls)})


def error_body(error: TandemError) -> bytes:
    """An error in OpenAI's form."""
    param = error.field if isinstance(error, InvalidRequest) else None
    inner = {"message": error.message, "type": error.openai_type, "param": param, "code": error.code}
    return json.dumps({"error": inner}).encode()


def usage_of(answers: Answers) -> dict[str, object]:
    """The usage of all answers so far; a prompt with several answers counts once."""
    prompt, completion = answers.num_prompt_tokens, answers.num_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": answers.num_cached_tokens},
    }


class EventWriter:
    """Server-sent events of one streamed reply. What is the same in all of them is serialised once.

    Where the answer is kept for a client that comes back, an event's id says which request, and how many of its tokens
    the client has with that event: it sends the last one as Last-Event-ID.
    """

    def __init__(self, answers: Answers, form: ReplyForm, tokenizer: Tokenizer) -> None:
        self._form = form
        self._tokenizer = tokenizer
        self._id_head = "" if answers.form is None else f"id: {answers.request_id}{EVENT_ID_MARK}"
        kind = "chat.completion.chunk" if form.chat else "text_completion"
        head = {"id": answers.request_id, "object": kind, "created": form.created_s, "model": form.model}
        self._head = "data: " + json.dumps(head)[:-1] + ', "choices": ['
        self._tail = '], "usage": null}\n\n' if form.include_usage else "]}\n\n"
        self._plain_tail = ', "logprobs": null, "finish_reason": null}' + self._tail
        self._openings: dict[int, str] = {}
        self._begun: set[int] = {0} if answers.skip else set()

    def piece(self, number: int, piece: Piece) -> bytes:
        """The events for one piece of answer `number`; may be empty."""
        opening = self._openings.get(number)
        if opening is None:
            start = '"delta": {"content": ' if self._form.chat else '"text": '
            opening = self._openings[number] = f'{self._head}{{"index": {number}, {start}'
        close = "}" if self._form.chat else ""
        mark = f"{self._id_head}{piece.index + len(piece.tokens)}\n" if self._id_head else ""
        events = ""
        if self._form.chat and number not in self._begun:
            self._begun.add(number)
            role = '"delta": {"role": "assistant", "content": ""}'
            events = f'{self._head}{{"index": {number}, {role}{self._plain_tail}'
        rich = self._form.logprobs or self._form.token_ids
        if rich and piece.tokens:
            events += f"{mark}{opening}{quoted(piece.text)}{close}{self._rich(piece)}"
        elif piece.text:
            events += f"{mark}{opening}{quoted(piece.text)}{close}{self._plain_tail}"
        if piece.finish is not None:
            events += mark + self._end(number, piece, piece.finish)
        return events.encode()

    def usage(self, answers: Answers) -> bytes:
        """The last event before [DONE] when the client asked for the usage."""
        return f'{self._head}], "usage": {json.dumps(usage_of(answers))}}}\n\n'.encode()

    @staticmethod
    def error(error: TandemError) -> bytes:
        """An error after the reply has begun."""
        return b"data: " + error_body(error) + b"\n\n"

    def _rich(self, piece: Piece) -> str:
        logprobs = logprobs_of([piece], self._form.chat, self._tokenizer) if self._form.logprobs else None
        ids = f', "token_ids": {json.dumps(_ids([piece]))}' if self._form.token_ids else ""
        return f', "logprobs": {json.dumps(logprobs)}, "finish_reason": null{ids}}}{self._tail}'

    def _end(self, number: int, piece: Piece, finish: FinishReason) -> str:
        body = '"delta": {}' if self._form.chat else '"text": ""'
        reason = json.dumps(piece.stop_reason)
        return (
            f'{self._head}{{"index": {number}, {body}, "logprobs": null, "finish_reason": "{finish.value}", '
            f'"stop_reason": {reason}}}{self._tail}'
        )


def whole_reply(form: ReplyForm, tokenizer: Tokenizer, answers: Answers, pieces: Sequence[Sequence[Piece]]) -> bytes:
    """The reply that is not streamed: `pieces` of each answer, all of them, in order."""
    choices = []
    for number, own in enumerate(pieces):
        text = "".join(piece.text for piece in own)
        last = own[-1]
        assert last.finish is not None, "an answer ends with its finish"
        choice: dict[str, object] = {"index": number}
        choice |= {"message": {"role": "assistant", "content": text}} if form.chat else {"text": text}
        choice["logprobs"] = logprobs_of(own, form.chat, tokenizer) if form.logprobs else None
        choice |= {"finish_reason": last.finish.value, "stop_reason": last.stop_reason}
        if form.token_ids:
            choice["token_ids"] = _ids(own)
        choices.append(choice)
    reply = {
        "id": answers.request_id,
        "object": "chat.completion" if form.chat else "text_completion",
        "created": form.created_s,
        "model": form.model,
        "choices": choices,
        "usage": usage_of(answers),
    }
    return json.dumps(reply).encode()


def logprobs_of(pieces: Sequence[Piece], chat: bool, tokenizer: Tokenizer) -> dict[str, object]:
    """The logprobs of the pieces' tokens in the form of chat or of legacy completions."""
    pairs = [
        (token, offset) for piece in pieces for token, offset in zip(piece.tokens, piece.offsets, strict=True)
    ]  # fmt: skip
    if chat:
        return {"content": [_chat_logprob(token, tokenizer) for token, _ in pairs], "refusal": None}
    return {
        "tokens": [_spelled(token.token_id, tokenizer) for token, _ in pairs],
        "token_logprobs": [_finite(token.logprob) for token, _ in pairs],
        "top_logprobs": [
            {_spelled(each, tokenizer): _finite(logprob) for each, logprob in token.top} for token, _ in pairs
        ],
        "text_offset": [offset for _, offset in pairs],
    }


def _chat_logprob(token: Token, tokenizer: Tokenizer) -> dict[str, object]:
    top = [_logprob(token_id, logprob, tokenizer) for token_id, logprob in token.top]
    return _logprob(token.token_id, token.logprob, tokenizer) | {"top_logprobs": top}


def _logprob(token_id: int, logprob: float | None, tokenizer: Tokenizer) -> dict[str, object]:
    spelled = tokenizer.token_bytes(token_id)
    return {"token": spelled.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(spelled)}


def _spelled(token_id: int, tokenizer: Tokenizer) -> str:
    return tokenizer.token_bytes(token_id).decode(errors="replace")


def _finite(logprob: float | None) -> float | None:
    if logprob is None or math.isnan(logprob):
        return None
    return max(logprob, LEAST_LOGPROB)


def _ids(pieces: Sequence[Piece]) -> list[int]:
    return [token.token_id for piece in pieces for token in piece.tokens]
