"""How a transcript is written in the shared store, by tandem/v1/journal.proto. Wrong content is a ValueError."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from google.protobuf.message import DecodeError

from router.events import NewRequest, Usage
from router.transcripts import Ended, Keep
from tandem import wire
from tandem.request import RequestId, Token
from tandem.v1 import inference_pb2, journal_pb2

VERSION = 1


def encode_entry(new: NewRequest, keep: Keep) -> bytes:
    """What was asked."""
    entry = journal_pb2.JournalEntry(
        version=VERSION,
        request_id=new.request_id,
        tokens=new.tokens,
        sampling=wire.encode_sampling(new.sampling),
        deadline_ms=new.deadline_ms,
        priority=new.priority,
        model=new.model,
        form=keep.form,
        digest=keep.digest,
        idempotency_key=keep.key,
        resume_ms=keep.resume_ms,
        owner=new.owner,
        cache_salt=new.cache_salt,
    )
    return entry.SerializeToString()


def decode_entry(content: bytes) -> tuple[NewRequest, Keep]:
    """What was asked. ValueError where it is of another version of Tandem, or damaged."""
    entry = journal_pb2.JournalEntry()
    try:
        entry.ParseFromString(content)
    except DecodeError as error:
        raise ValueError(f"journal entry: {error}") from None
    if entry.version != VERSION:
        raise ValueError(f"version: is {entry.version}, this router reads {VERSION}")
    new = NewRequest(
        request_id=RequestId(entry.request_id),
        tokens=tuple(entry.tokens),
        sampling=wire.decode_sampling(entry.sampling),
        deadline_ms=entry.deadline_ms,
        priority=entry.priority,
        model=entry.model,
        owner=entry.owner,
        cache_salt=entry.cache_salt,
    )
    keep = Keep(form=entry.form, digest=entry.digest, key=entry.idempotency_key, resume_ms=entry.resume_ms)
    return new, keep


def encode_tokens(tokens: Iterable[Token]) -> bytes:
    """Tokens that follow one another; whose they are, the key of the record says."""
    bare = (wire.encode_token(replace(token, request_id=RequestId(""), epoch=0)) for token in tokens)
    return journal_pb2.JournalTokens(tokens=bare).SerializeToString()


def decode_tokens(request_id: RequestId, pieces: Iterable[bytes]) -> tuple[Token, ...]:
    """The answer so far. ValueError where a token is missing or damaged."""
    tokens: list[Token] = []
    for content in pieces:
        piece = journal_pb2.JournalTokens()
        try:
            piece.ParseFromString(content)
        except DecodeError as error:
            raise ValueError(f"journal tokens: {error}") from None
        for message in piece.tokens:
            if message.index != len(tokens):
                raise ValueError(f"journal tokens: token {message.index} stands where {len(tokens)} is due")
            message.request_id = request_id
            tokens.append(wire.decode_token(message))
    return tuple(tokens)


def encode_end(ended: Ended) -> bytes:
    """How it ended."""
    end = journal_pb2.JournalEnd(num_tokens=ended.num_tokens, code=ended.code, message=ended.message)
    if ended.usage is not None:
        end.usage.CopyFrom(
            inference_pb2.Usage(
                prompt_tokens=ended.usage.prompt_tokens,
                completion_tokens=ended.usage.completion_tokens,
                cached_tokens=ended.usage.cached_tokens,
            )
        )
    return end.SerializeToString()


def decode_end(content: bytes) -> Ended:
    """How it ended."""
    end = journal_pb2.JournalEnd()
    try:
        end.ParseFromString(content)
    except DecodeError as error:
        raise ValueError(f"journal end: {error}") from None
    usage = Usage(
        prompt_tokens=end.usage.prompt_tokens,
        completion_tokens=end.usage.completion_tokens,
        cached_tokens=end.usage.cached_tokens,
    )
    return Ended(
        num_tokens=end.num_tokens,
        usage=usage if end.HasField("usage") else None,
        code=end.code,
        message=end.message,
    )
