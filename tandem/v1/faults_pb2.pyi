from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Link(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LINK_UNSPECIFIED: _ClassVar[Link]
    LINK_ROUTERS: _ClassVar[Link]
    LINK_WORKERS: _ClassVar[Link]
    LINK_AGENTS: _ClassVar[Link]

class Signal(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SIGNAL_UNSPECIFIED: _ClassVar[Signal]
    SIGNAL_KILL: _ClassVar[Signal]
    SIGNAL_STOP: _ClassVar[Signal]
LINK_UNSPECIFIED: Link
LINK_ROUTERS: Link
LINK_WORKERS: Link
LINK_AGENTS: Link
SIGNAL_UNSPECIFIED: Signal
SIGNAL_KILL: Signal
SIGNAL_STOP: Signal

class DisturbRequest(_message.Message):
    __slots__ = ("link", "for_ms", "period_ms", "corrupt_every")
    LINK_FIELD_NUMBER: _ClassVar[int]
    FOR_MS_FIELD_NUMBER: _ClassVar[int]
    PERIOD_MS_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_EVERY_FIELD_NUMBER: _ClassVar[int]
    link: Link
    for_ms: int
    period_ms: int
    corrupt_every: int
    def __init__(self, link: _Optional[_Union[Link, str]] = ..., for_ms: _Optional[int] = ..., period_ms: _Optional[int] = ..., corrupt_every: _Optional[int] = ...) -> None: ...

class DisturbResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AmbushRequest(_message.Message):
    __slots__ = ("state", "signal", "agent", "after_ms", "within_ms")
    STATE_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    WITHIN_MS_FIELD_NUMBER: _ClassVar[int]
    state: str
    signal: Signal
    agent: bool
    after_ms: int
    within_ms: int
    def __init__(self, state: _Optional[str] = ..., signal: _Optional[_Union[Signal, str]] = ..., agent: _Optional[bool] = ..., after_ms: _Optional[int] = ..., within_ms: _Optional[int] = ...) -> None: ...

class AmbushResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
