"""The receiving end of an agent under frames that are valid, damaged, replayed, late or of another attempt.

The link, its framing, the attempts and the copying are the agent's own, over a real local socket and two pools in
shared memory. Beside them runs a model that knows the rules and not the code: which blocks are granted to whom. Only
those may change; a frame within the rules is acknowledged, every other is refused; each attempt becomes quiet once.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from dataclasses import dataclass, field, replace
from typing import Any

import xxhash
from draws import EDGES, Draws
from random_messages import damage

from engine.kv_pool import shared_memory
from kv_transfer import agent_context, agent_wire
from kv_transfer.agent_attempts import Attempts
from kv_transfer.agent_context import AgentContext
from kv_transfer.agent_incoming import IncomingLink
from kv_transfer.agent_settings import AgentSettings, AgentStart, TransportChoice
from kv_transfer.agent_wire import Ack, Announce, Hello, Nack, Ping, encode
from kv_transfer.endpoint import Endpoint, format_endpoint, parse_endpoint
from kv_transfer.framed_socket import MAX_MESSAGE_BYTES, FramedSocket, LinkLost
from kv_transfer.messages import EndTransfer, ExpectFrames, FrameHeader, FrameLanded, TransferQuiet
from kv_transfer.seal import SALT_BYTES
from kv_transfer.transports.shm import NONCE_BYTES, nonce_memory
from tandem.request import TransferId

NUM_BLOCKS, BLOCK_BYTES = 16, 128
LAYOUT = b"layout-digest-16"
SOURCE_AGENT = 7
SOURCE, TARGET = 11, 22  # incarnations of the workers
TRANSFERS = ("t0", "t1", "t2")
STEPS_MAX = 64
EMPTY = bytes(NUM_BLOCKS * BLOCK_BYTES)
SALT = b"s" * SALT_BYTES

Key = tuple[str, int]
Answered = tuple[str, int, int]


@dataclass(slots=True)
class Granted:
    """What the model knows of one attempt."""

    source_incarnation: int
    target_incarnation: int
    source_agent: int
    blocks: dict[int, int] = field(default_factory=dict)
    landed: dict[int, tuple[tuple[int, ...], int]] = field(default_factory=dict)


class Mishaps(logging.Handler):
    """What the agent logs as its own mistake: it lives on, and the run has failed."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.errors: list[BaseException | str] = []
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps the exception itself where there is one. Other threads are other tests'."""
        if record.thread != self._thread:
            return
        error = record.exc_info[1] if record.exc_info else None
        self.errors.append(error or record.getMessage())


class Steps(FramedSocket):
    """The link's own socket; where it would wait, the script's next step happens.

    Without seals: the peer is one that has the cluster's secret, and lies all the same.
    """

    world: World

    def __setattr__(self, name: str, value: object) -> None:
        """Leaves out the seals."""
        if name not in ("sealing", "opening") or value is None:
            super().__setattr__(name, value)

    def receive(self, timeout_s: float) -> agent_wire.Message | None:
        """The next message, whose time it is; LinkLost when the script says so, or ends."""
        while True:
            message = self.buffered()
            if message is not None:
                self.world.arrived(message)
                return message
            self.world.step()
            self._fill()


class World:
    """Both ends, the rules and the script of one input. Made once, used for every input."""

    def __init__(self) -> None:
        agent_context.GRANT_WAIT_S = 0.0  # nothing happens while a frame waits to become expected
        self._target_fd = shared_memory("target", NUM_BLOCKS * BLOCK_BYTES)
        self._source_fd = shared_memory("source", NUM_BLOCKS * BLOCK_BYTES)
        self._nonce_fd = nonce_memory(b"n" * NONCE_BYTES)
        self._content = b"".join(bytes([block * 13 + 1]) * BLOCK_BYTES for block in range(NUM_BLOCKS))
        os.pwrite(self._source_fd, self._content, 0)
        settings = AgentSettings(transport=TransportChoice.SHM)
        start = AgentStart(
            pool=self._target_fd, control_fd=-1, parent_pid=os.getpid(), num_blocks=NUM_BLOCKS,
            block_bytes=BLOCK_BYTES, layout_digest=LAYOUT, settings=settings,
        )  # fmt: skip
        self.context = AgentContext(start)
        self._mishaps = Mishaps()
        log = logging.getLogger("kv_transfer")
        log.addHandler(self._mishaps)
        log.propagate = False
        self._endpoint = Endpoint(host="127.0.0.1", port=1, uds="u", incarnation=SOURCE_AGENT, token="00")
        self._begin(Draws(b""))

    def _begin(self, draws: Draws) -> None:
        self.context._attempts = Attempts()
        os.pwrite(self._target_fd, EMPTY, 0)
        self._draws = draws
        self._shadow = bytearray(EMPTY)
        self._granted: dict[Key, Granted] = {}
        self._over: set[Key] = set()
        self._quiet: dict[Key, int] = {}
        self._sent: list[bytes] = []
        self._due: tuple[Announce, bool] | None = None  # the frame that must be answered next, and whether with an ack
        self._welcomed = False
        self._steps = 0
        self.num_frames = 0
        self.num_acked = 0

    # ---- one input ----

    def run(self, data: bytes) -> int:
        """Plays the script that `data` is; the number of frames announced. AssertionError when a rule was broken."""
        self._begin(Draws(data))
        while self._draws.left and self._steps < STEPS_MAX:
            self._connect()
        for key in [*self._granted]:
            self._end(key)
        self._hear()
        assert not self.context._attempts._open, "an attempt that was ended is still open"
        for key in self._over:
            assert self._quiet.get(key, 0) >= 1, f"{key} was ended and is not quiet"
        return self.num_frames

    def _connect(self) -> None:
        near, self._far = socket.socketpair()
        self._far.setblocking(False)
        self._reader = FramedSocket(self._far, send_timeout_s=1)
        link = IncomingLink(self.context, near)
        stepped = Steps(near, send_timeout_s=1)
        stepped.world = self
        link._sock = stepped
        self._due, self._welcomed, self._greeted = None, False, False
        link.run()
        if self._mishaps.errors:
            error = self._mishaps.errors.pop()
            raise error if isinstance(error, BaseException) else AssertionError(error)
        self._listen(to_the_end=True)
        self._reader.close()

    def step(self) -> None:
        """Something happens at the other end, or the worker says something."""
        self._listen()
        self._steps += 1
        if self._steps >= STEPS_MAX or not self._draws.left:
            self._hang_up()
            return
        if not self._greeted:
            self._greeted = True
            self._say_hello()
            return
        kind = self._draws.below(64)
        if kind < 8 or not self._granted:
            self._expect()
        elif kind < 10:
            self._end((self._draws.pick(TRANSFERS), self._draws.below(3)))
        elif kind < 16 and self._sent:
            self._put(self._draws.pick(self._sent))  # once more, perhaps after a new link
        elif kind < 18 and self._sent:
            self._put(damage(self._draws.pick(self._sent), self._draws))
        elif kind < 19:
            self._put(encode(Ping(number=self._draws.whole(64), answer=bool(self._draws.below(2)))))
        elif kind < 20:
            self._put(self._draws.raw(self._draws.below(40)))
        elif kind < 21:
            self._hang_up()
        else:
            self._put(encode(self._announce()))

    # ---- what the worker says ----

    def _expect(self) -> None:
        draws = self._draws
        key = (draws.pick(TRANSFERS), draws.below(3))
        blocks = tuple(draws.below(NUM_BLOCKS + 2) for _ in range(1 + draws.below(12)))
        generations = tuple(draws.below(3) for _ in blocks)
        agent = SOURCE_AGENT if draws.byte() < 240 else 8
        command = ExpectFrames(
            transfer_id=TransferId(key[0]), epoch=key[1], source_incarnation=SOURCE, target_incarnation=TARGET,
            blocks=blocks, generations=generations,
            endpoint=format_endpoint(replace(self._endpoint, incarnation=agent)),
        )  # fmt: skip
        self.context.expect(command, parse_endpoint(command.endpoint))
        if key in self._over:
            return
        known = self._granted.setdefault(key, Granted(SOURCE, TARGET, agent))
        known.source_agent = agent
        known.blocks.update(zip(blocks, generations, strict=True))

    def _end(self, key: Key) -> None:
        self.context.end(EndTransfer(transfer_id=TransferId(key[0]), epoch=key[1]))
        self._over.add(key)
        self._granted.pop(key, None)

    # ---- what the peer says ----

    def _say_hello(self) -> None:
        draws = self._draws
        hello = Hello(
            magic=agent_wire.MAGIC, version=agent_wire.PROTOCOL_VERSION, layout_digest=LAYOUT,
            source_agent=SOURCE_AGENT, target_agent=self.context.incarnation, token=self.context.token, salt=SALT,
            transport="auto", memory="host", cuda_pool=b"", block_bytes=BLOCK_BYTES, num_blocks=NUM_BLOCKS,
        )  # fmt: skip
        descriptors = [self._source_fd, self._nonce_fd]
        if draws.chance(64):
            wrong: list[dict[str, Any]] = [
                {"magic": draws.raw(9)},
                {"version": draws.whole(32)},
                {"layout_digest": draws.raw(16)},
                {"target_agent": draws.whole(64)},
                {"token": draws.raw(16)},
                {"salt": draws.raw(17)},
                {"transport": draws.text(("shm", "gloo", "auto"))},
                {"memory": draws.text(("cuda",))},
                {"num_blocks": draws.pick((0, NUM_BLOCKS + 1, 1 << 60, (1 << 64) - 1))},
                {"block_bytes": draws.whole(64)},
                {"source_agent": 8},
            ]
            hello = replace(hello, **draws.pick(wrong))
            del descriptors[draws.below(3) :]
        body = encode(hello)
        if draws.chance(8):
            body = damage(body, draws)
        data = len(body).to_bytes(4, "big") + body
        if descriptors:
            socket.send_fds(self._far, [data], descriptors)
        else:
            self._far.send(data)

    def _announce(self) -> Announce:
        """A frame of an attempt that is granted, and now and then wrong in one field or in all."""
        draws = self._draws
        key = draws.pick([*self._granted]) if self._granted and draws.byte() < 224 else (draws.pick(TRANSFERS), 0)
        known = self._granted.get(key, Granted(SOURCE, TARGET, SOURCE_AGENT, {0: 0}))
        of = [*known.blocks] or [0]
        blocks = tuple(dict.fromkeys(draws.pick(of) for _ in range(1 + draws.below(4))))
        source = tuple(draws.below(NUM_BLOCKS) for _ in blocks)
        header = FrameHeader(
            transfer_id=TransferId(key[0]), epoch=key[1], source_incarnation=SOURCE, target_incarnation=TARGET,
            sequence=draws.below(8), source_blocks=source, source_generations=source, target_blocks=blocks,
            target_generations=tuple(known.blocks.get(block, 0) for block in blocks),
            num_bytes=len(blocks) * BLOCK_BYTES,
        )  # fmt: skip
        checksum = self._checksum(source)
        if draws.chance(64):
            others = tuple(block ^ draws.below(4) for block in blocks)
            wrong: list[dict[str, Any]] = [
                {"epoch": draws.whole(64)},
                {"source_incarnation": draws.whole(64)},
                {"target_incarnation": draws.whole(64)},
                {"sequence": draws.whole(64)},
                {"source_blocks": tuple(draws.whole(32) for _ in blocks)},
                {"target_blocks": tuple(dict.fromkeys(others)) if len({*others}) == len(blocks) else blocks},
                {"target_generations": tuple(draws.whole(32) for _ in blocks)},
                {"num_bytes": draws.pick(EDGES)},
                {"transfer_id": TransferId(draws.text())},
            ]
            header = replace(header, **draws.pick(wrong))
        checksum = checksum if draws.byte() < 224 else draws.whole(64)
        return Announce(header=header, checksum=checksum, tag=b"")

    def _checksum(self, blocks: tuple[int, ...]) -> int:
        content = (self._content[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] for block in blocks)
        return xxhash.xxh3_64_intdigest(b"".join(content))

    def _put(self, body: bytes) -> None:
        length = len(body)
        if self._draws.byte() > 252:
            length = self._draws.pick((length + 1, MAX_MESSAGE_BYTES + 1, 0xFFFFFFFF))
        elif len(self._sent) < 32:
            self._sent.append(body)
        self._far.send(length.to_bytes(4, "big") + body)

    def _hang_up(self) -> None:
        self._far.shutdown(socket.SHUT_WR)

    # ---- the rules ----

    def arrived(self, message: agent_wire.Message) -> None:
        """The link has the message now, and will do what it does of it before it asks for the next."""
        self._listen()
        if isinstance(message, Hello):
            self._agent = message.source_agent
        if self._welcomed and isinstance(message, Announce):
            self.num_frames += 1
            self._due = (message, self._allows(message))

    def _allows(self, message: Announce) -> bool:
        """Whether the rules take this frame. What it may write is written down in the shadow."""
        header = message.header
        known = self._granted.get((header.transfer_id, header.epoch))
        if known is None or known.source_agent != self._agent:
            return False
        incarnations = (header.source_incarnation, header.target_incarnation)
        if incarnations != (known.source_incarnation, known.target_incarnation):
            return False
        for block, generation in zip(header.target_blocks, header.target_generations, strict=True):
            if known.blocks.get(block) != generation:
                return False
        before = known.landed.get(header.sequence)
        if before is not None:
            return before == (header.target_blocks, message.checksum)
        in_source = all(block < NUM_BLOCKS for block in header.source_blocks)
        in_target = all(block < NUM_BLOCKS for block in header.target_blocks)
        if header.num_bytes != len(header.source_blocks) * BLOCK_BYTES or not (in_source and in_target):
            return False
        for here, there in zip(header.target_blocks, header.source_blocks, strict=True):
            content = self._content[there * BLOCK_BYTES : (there + 1) * BLOCK_BYTES]
            self._shadow[here * BLOCK_BYTES : (here + 1) * BLOCK_BYTES] = content
        if self._checksum(header.source_blocks) != message.checksum:
            return False
        known.landed[header.sequence] = (header.target_blocks, message.checksum)
        return True

    def _listen(self, *, to_the_end: bool = False) -> None:
        """What the link has answered since, and what it told its worker: both as the rules have it."""
        answers: list[agent_wire.Message] = []
        try:
            while (message := self._reader.receive(0)) is not None:
                answers.append(message)
        except LinkLost as error:
            if not ("closed" in str(error) or "broken" in str(error)):
                raise AssertionError("the agent answers nonsense") from error
        for answer in answers:
            if isinstance(answer, agent_wire.Welcome):
                self._welcomed = True
            elif isinstance(answer, Ack | Nack):
                self._judge(answer)
        if not to_the_end:
            assert self._due is None, f"a frame got no answer: {self._due}"
        self._due = None
        self._hear()
        pool = os.pread(self._target_fd, len(EMPTY), 0)
        assert pool == self._shadow, f"blocks {_differing(pool, bytes(self._shadow))} were written without a grant"

    def _judge(self, answer: Ack | Nack) -> None:
        assert self._due is not None, f"an answer to nothing: {answer}"
        message, allowed = self._due
        header = message.header
        assert (answer.transfer_id, answer.epoch, answer.sequence) == (
            header.transfer_id, header.epoch, header.sequence,
        )  # fmt: skip
        assert isinstance(answer, Ack) == allowed, f"{answer} to {message}, which the rules {allowed=}"
        assert isinstance(answer, Ack) or answer.reason, "a refusal names its reason"
        self.num_acked += allowed
        self._due = None

    def _hear(self) -> None:
        while not self.context.events.empty():
            event = self.context.events.get_nowait()
            if isinstance(event, TransferQuiet):
                key = (event.transfer_id, event.epoch)
                assert key in self._over, f"{key} is quiet and was not ended"
                self._quiet[key] = self._quiet.get(key, 0) + 1
            elif isinstance(event, FrameLanded):
                granted = self._granted[event.transfer_id, event.epoch]
                assert granted.landed[event.sequence] == (event.target_blocks, event.checksum)


def _differing(pool: bytes, shadow: bytes) -> list[int]:
    step = BLOCK_BYTES
    return [block for block in range(NUM_BLOCKS) if pool[block * step :][:step] != shadow[block * step :][:step]]


def seeds() -> list[bytes]:
    """Scripts that grant and send, so that a fuzzer begins past the hello."""
    scripts = []
    for first in range(1, 60):
        script = bytearray()
        for at in range(300):
            script.append((first * 97 + at * at * 31 + at * 7) % 256)
        scripts.append(bytes(script))
    return scripts
