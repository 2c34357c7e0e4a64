"""What follows from one event, in order: words to workers, tokens to clients, ends."""

from __future__ import annotations

from router.events import Action, Deliver, SendToWorker
from router.fleet import Worker, WorkerState
from tandem.messages import RouterMessage
from tandem.request import RequestId, Token


class Outbox:
    """Collects the actions of an event, for all who have a say in it."""

    def __init__(self) -> None:
        self._actions: list[Action] = []

    def take(self) -> list[Action]:
        """What was collected; it is collected anew from here on."""
        taken, self._actions = self._actions, []
        return taken

    def add(self, action: Action) -> None:
        self._actions.append(action)

    def send(self, worker: Worker, message: RouterMessage, reason: str) -> None:
        """Says it to the worker; one that has no stream is past hearing it."""
        if worker.link is WorkerState.READY:
            self._actions.append(
                SendToWorker(worker_id=worker.worker_id, incarnation=worker.incarnation, message=message, reason=reason)
            )

    def deliver(self, request_id: RequestId, token: Token) -> None:
        """Delivers the next token, together with those of the same request that go just before it."""
        last = self._actions[-1] if self._actions else None
        if isinstance(last, Deliver) and last.request_id == request_id:
            self._actions[-1] = Deliver(request_id=request_id, tokens=(*last.tokens, token))
        else:
            self._actions.append(Deliver(request_id=request_id, tokens=(token,)))
