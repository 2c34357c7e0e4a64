"""A stream socket that carries whole messages, each after its length, and now and then file descriptors."""

from __future__ import annotations

import array
import os
import select
import socket
import struct
import threading
import time
from contextlib import suppress

from kv_transfer.agent_wire import Message, decode, encode
from kv_transfer.gate import Gate
from kv_transfer.seal import Forged, Seal

MAX_MESSAGE_BYTES = 4 << 20
MAX_DESCRIPTORS = 2
POLL_WAIT_S = 0.01
SHUT_WAIT_S = 0.5  # that a message waits for a slow link; then it is held, as the network holds it
MAX_HELD = 1024
_LENGTH = struct.Struct(">I")


class LinkLost(Exception):
    """The other end is gone, hangs, or speaks another language. The message says which."""


class LinkForged(LinkLost):
    """Somebody who is no member of the cluster speaks on the link, or repeats what a member said."""


class FramedSocket:
    """Sends from any thread, one message at a time; receives on one thread only. `gate`: when anything may pass.

    With `sealing` every message that leaves is sealed, with `opening` every one that arrives must be.
    """

    def __init__(self, connection: socket.socket, *, send_timeout_s: float, gate: Gate | None = None) -> None:
        connection.setblocking(False)
        self.connection = connection
        self._send_timeout_s = send_timeout_s
        self._gate = gate or Gate()
        self._held: list[tuple[bytes, tuple[int, ...]]] = []  # written while nothing passed; guarded by _sending
        self._sending = threading.Lock()
        self._received = bytearray()
        self.sealing: Seal | None = None
        self.opening: Seal | None = None
        self.descriptors: list[int] = []  # that came with what was received; whoever takes one out closes it

    def fileno(self) -> int:
        """For poll."""
        return self.connection.fileno()

    def send(self, message: Message, descriptors: tuple[int, ...] = ()) -> None:
        """Sends the whole message within the send timeout. Raises LinkLost."""
        body = encode(message)
        with self._sending:
            if self.sealing is not None:
                body = self.sealing.seal(body)
            self._held.append((_LENGTH.pack(len(body)) + body, descriptors))
            if self._gate.wait_s(time.monotonic()) <= SHUT_WAIT_S and self._passes(SHUT_WAIT_S):
                self._flush()
            elif len(self._held) > MAX_HELD:
                raise LinkLost("cannot be written to, and nothing more can be held")

    def _flush(self) -> None:
        """Writes what is held: one message, but for a link that was shut for a while. Under `_sending`."""
        held, self._held = self._held, []
        for data, descriptors in held:
            self._write(memoryview(data), descriptors)

    def _write(self, data: memoryview, descriptors: tuple[int, ...]) -> None:
        ends = time.monotonic() + self._send_timeout_s
        while data:
            try:
                if descriptors:
                    sent = socket.send_fds(self.connection, [data], list(descriptors))
                    descriptors = ()
                else:
                    sent = self.connection.send(data)
            except BlockingIOError:
                if not wait_for(self.connection, ends - time.monotonic(), write=True):
                    raise LinkLost(f"cannot be written to for {self._send_timeout_s:g} s") from None
                continue
            except OSError as error:
                raise LinkLost(f"broken: {error}") from None
            data = data[sent:]

    def buffered(self) -> Message | None:
        """The next message that is already here in full, or None. Raises LinkLost on what cannot be decoded."""
        if len(self._received) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._received)
        if length > MAX_MESSAGE_BYTES:
            raise LinkLost(f"a message of {length} bytes, at most {MAX_MESSAGE_BYTES} are taken")
        end = _LENGTH.size + length
        if len(self._received) < end:
            return None
        body = bytes(self._received[_LENGTH.size : end])
        del self._received[:end]
        try:
            return decode(body if self.opening is None else self.opening.open(body))
        except Forged as error:
            raise LinkForged(f"a message is refused: {error}") from None
        except ValueError as error:
            raise LinkLost(f"a malformed message: {error}") from None

    def receive(self, timeout_s: float) -> Message | None:
        """The next message, or None when none came in full within the timeout. Raises LinkLost."""
        ends = time.monotonic() + timeout_s
        while True:
            # A poll that sees something to read must not spin while nothing passes.
            if not self._passes(max(POLL_WAIT_S, ends - time.monotonic())):
                return None
            if self._held:
                with self._sending:
                    self._flush()
            message = self.buffered()
            if message is not None:
                return message
            if not wait_for(self.connection, ends - time.monotonic()):
                return None
            self._fill()

    def _passes(self, timeout_s: float) -> bool:
        """Whether the gate lets anything pass within the timeout."""
        ends = time.monotonic() + timeout_s
        while (wait_s := self._gate.wait_s(now_s := time.monotonic())) > 0:
            if now_s + wait_s > ends:
                time.sleep(max(0.0, ends - now_s))
                return False
            time.sleep(wait_s)
        return True

    def _fill(self) -> None:
        try:
            if self.connection.family == socket.AF_UNIX:
                room = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
                data, ancillary, _, _ = self.connection.recvmsg(65536, room, socket.MSG_CMSG_CLOEXEC)
                for level, kind, raw in ancillary:
                    if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                        found = array.array("i")
                        found.frombytes(raw[: len(raw) - len(raw) % found.itemsize])
                        self.descriptors.extend(found)
                if len(self.descriptors) > MAX_DESCRIPTORS:  # closed by `close`: a stranger must not use them up
                    raise LinkLost(f"more than {MAX_DESCRIPTORS} descriptors came")
            else:
                data = self.connection.recv(65536)
        except BlockingIOError:
            return
        except OSError as error:
            raise LinkLost(f"broken: {error}") from None
        if not data:
            raise LinkLost("closed by the other end")
        self._received += data

    def hang_up(self) -> None:
        """Ends the connection; a thread that waits in `receive` or `send` wakes with LinkLost. From any thread."""
        with suppress(OSError):  # the other end was faster
            self.connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the socket and what descriptors nobody took. Only by the thread that receives."""
        self.hang_up()
        self.connection.close()
        while self.descriptors:
            os.close(self.descriptors.pop())


def wait_for(connection: socket.socket, timeout_s: float, *, write: bool = False) -> bool:
    """Whether the socket can be read (or written) within the timeout. A closed socket counts as readable."""
    if connection.fileno() < 0:
        return True
    poller = select.poll()
    poller.register(connection, select.POLLOUT if write else select.POLLIN)
    return bool(poller.poll(max(0, int(timeout_s * 1000 + 0.999))))


def address_family(host: str) -> socket.AddressFamily:
    """IPv6 for an IPv6 address, else IPv4."""
    with suppress(OSError):
        socket.inet_pton(socket.AF_INET6, host)
        return socket.AF_INET6
    return socket.AF_INET
