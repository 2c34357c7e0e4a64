from tandem.v1 import inference_pb2 as _inference_pb2
from tandem.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class JournalEntry(_message.Message):
    __slots__ = ("version", "request_id", "tokens", "sampling", "deadline_ms", "priority", "model", "form", "digest", "idempotency_key", "resume_ms", "owner", "cache_salt")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FORM_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    RESUME_MS_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    version: int
    request_id: str
    tokens: _containers.RepeatedScalarFieldContainer[int]
    sampling: _worker_pb2.Sampling
    deadline_ms: int
    priority: int
    model: str
    form: bytes
    digest: bytes
    idempotency_key: str
    resume_ms: int
    owner: str
    cache_salt: bytes
    def __init__(self, version: _Optional[int] = ..., request_id: _Optional[str] = ..., tokens: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_worker_pb2.Sampling, _Mapping]] = ..., deadline_ms: _Optional[int] = ..., priority: _Optional[int] = ..., model: _Optional[str] = ..., form: _Optional[bytes] = ..., digest: _Optional[bytes] = ..., idempotency_key: _Optional[str] = ..., resume_ms: _Optional[int] = ..., owner: _Optional[str] = ..., cache_salt: _Optional[bytes] = ...) -> None: ...

class JournalTokens(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[_worker_pb2.Token]
    def __init__(self, tokens: _Optional[_Iterable[_Union[_worker_pb2.Token, _Mapping]]] = ...) -> None: ...

class JournalEnd(_message.Message):
    __slots__ = ("num_tokens", "usage", "code", "message")
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    num_tokens: int
    usage: _inference_pb2.Usage
    code: str
    message: str
    def __init__(self, num_tokens: _Optional[int] = ..., usage: _Optional[_Union[_inference_pb2.Usage, _Mapping]] = ..., code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...
