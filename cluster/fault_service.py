"""The gRPC service that arms faults in a worker: it exists only in a cluster that was started with --allow-faults."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from cluster.ambush import Ambush
from cluster.chaos_states import STATES
from kv_transfer.agent_wire import Disturb
from kv_transfer.gate import Gate
from tandem.v1 import faults_pb2 as pb
from tandem.v1 import faults_pb2_grpc

if TYPE_CHECKING:
    from typing import Any

    # The stubs are generic, the classes are not.
    _Context = grpc.aio.ServicerContext[Any, Any]

FOR_MS_MAX = 600_000  # nothing that is armed lasts longer
SIGNALS = {pb.SIGNAL_KILL: signal.SIGKILL, pb.SIGNAL_STOP: signal.SIGSTOP}


class FaultService(faults_pb2_grpc.FaultsServicer):
    """`gates` are those of links of this process, `disturb_agent` passes a fault on, `agent_pid` is 0 between two."""

    def __init__(
        self,
        *,
        gates: dict[int, Gate],
        disturb_agent: Callable[[Disturb], None],
        agent_pid: Callable[[], int],
        lay: Callable[[Ambush], None],
    ) -> None:
        self._gates = gates
        self._disturb_agent = disturb_agent
        self._agent_pid = agent_pid
        self._lay = lay

    async def Disturb(self, request: pb.DisturbRequest, context: _Context) -> pb.DisturbResponse:
        """Arms a fault of links or frames; a second one on the same links takes the place of the first."""
        await _check(context, "for_ms", request.for_ms)
        await _check(context, "period_ms", request.period_ms, least=0)
        if request.link == pb.LINK_AGENTS:
            self._disturb_agent(
                Disturb(for_ms=request.for_ms, period_ms=request.period_ms, corrupt_every=request.corrupt_every)
            )
        elif request.link in self._gates and not request.corrupt_every:
            self._gates[request.link].shut(
                time.monotonic(), for_s=request.for_ms / 1000, period_s=request.period_ms / 1000
            )
        else:
            told = f"link: is {request.link} with corrupt_every {request.corrupt_every}: there is no such fault"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, told)
        return pb.DisturbResponse()

    async def Ambush(self, request: pb.AmbushRequest, context: _Context) -> pb.AmbushResponse:
        """Lays an ambush, in place of the one that was laid."""
        await _check(context, "within_ms", request.within_ms)
        await _check(context, "after_ms", request.after_ms, least=0)
        if request.state not in STATES:
            told = f"state: is {request.state!r}, must be one of {', '.join(STATES)}"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, told)
        if request.signal not in SIGNALS:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"signal: is {request.signal}, must be kill or stop")
        number, on_agent = SIGNALS[request.signal], request.agent

        def strike() -> None:
            pid = self._agent_pid() if on_agent else os.getpid()
            if pid:
                with suppress(ProcessLookupError):  # the agent has just died by itself
                    os.kill(pid, number)

        self._lay(
            Ambush(
                state=request.state,
                strike=strike,
                after_ms=request.after_ms,
                until_s=time.monotonic() + request.within_ms / 1000,
            )
        )
        return pb.AmbushResponse()


async def _check(context: _Context, name: str, value_ms: int, *, least: int = 1) -> None:
    if not least <= value_ms <= FOR_MS_MAX:
        told = f"{name}: is {value_ms}, must be {least} to {FOR_MS_MAX}"
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, told)
