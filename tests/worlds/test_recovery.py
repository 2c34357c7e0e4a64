"""What a request that lost a worker computes again: no more than what nobody holds any more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.step import StepPlan
from router.events import Finish, NewRequest
from router.request import RequestSnapshot, RequestState
from simulator.choices import Choices
from simulator.router import VirtualRouter
from simulator.worker import VirtualWorker
from simulator.world import BLOCK_SIZE, World
from tandem.messages import Role
from tandem.request import RequestId, Sampling, WorkerId

R = RequestId("one")
PROMPT = tuple(range(60))
NUM = 24
GREEDY = Sampling(max_tokens=NUM, ignore_eos=True)


@dataclass
class Scene:
    """A calm world with one request, and how many of its tokens each worker computes."""

    world: World = field(default_factory=lambda: World(Choices()))
    computed: Counter[str] = field(default_factory=Counter)

    @property
    def router(self) -> VirtualRouter:
        return self.world.routers[0]

    def start(self, *workers: str) -> None:
        self.world.router_misfortune.start_router()
        for name in workers:
            self.world.start_worker(WorkerId(name), Role(name.split("-")[0]))
            self.count(self.world.workers[WorkerId(name)])
        self.world._look()
        self.run(lambda: all(self.world._is_heard(self.router, each) for each in self.world.workers.values()))
        self.world.checks.submitted(R, PROMPT, GREEDY, b"")
        self.router.ask_itself(NewRequest(request_id=R, tokens=PROMPT, sampling=GREEDY))

    def count(self, worker: VirtualWorker) -> None:
        run = worker.runner.run

        def counted(plan: StepPlan) -> object:
            self.computed[worker.worker_id] += sum(len(row.tokens) for row in plan.rows if row.request_id == R)
            return run(plan)

        worker.runner.run = counted  # type: ignore[method-assign, assignment]

    def run(self, until: Callable[[], bool]) -> None:
        self.world.schedule.run(until_ms=self.world.schedule.now_ms + 60_000, unless=until)
        assert until()

    def kill(self, name: str) -> None:
        worker = self.world.workers[WorkerId(name)]
        address = worker.address
        self.world.cut_link(worker, "killed")
        self.world.kill(worker)
        self.router.worker_lost(address.worker_id, address.incarnation, "killed")

    def num_seen(self) -> int:
        return self.world.checks._lives[self.router.name, R].num_tokens

    def finish(self) -> None:
        """The answer is whole; each of its tokens was compared with the oracle's."""
        (life,) = self.world.checks._lives.values()
        self.run(lambda: life.end is not None)
        assert isinstance(life.end, Finish)
        assert life.num_tokens == NUM

    def request(self) -> RequestSnapshot:
        (request,) = self.router.core.status(self.router.clock.now_ms).requests
        return request


def test_behind_a_lost_decode_worker_only_what_was_written_is_computed_again() -> None:
    """The prefill worker kept the prompt's blocks: prompt and delivered tokens are not read anew."""
    scene = Scene()
    scene.start("prefill-0", "decode-0", "decode-1")
    scene.run(lambda: scene.num_seen() >= 10)
    (first,) = [name for name in ("decode-0", "decode-1") if scene.computed[name]]
    num_seen, before = scene.num_seen(), scene.computed["prefill-0"]
    assert before == len(PROMPT)
    scene.kill(first)
    scene.finish()
    again = scene.computed["prefill-0"] - before
    assert 0 < again <= num_seen + BLOCK_SIZE, f"{again} tokens of {len(PROMPT) + num_seen}"


def test_behind_a_lost_prefill_worker_what_had_landed_is_not_computed_again() -> None:
    """It dies in mid-prefill: the decode worker has the first chunks' blocks, and reads the rest itself."""
    scene = Scene()
    scene.start("prefill-0", "prefill-1", "decode-0")
    victims = ("prefill-0", "prefill-1")
    scene.run(lambda: max(scene.computed[name] for name in victims) >= 40)
    first = max(victims, key=lambda name: scene.computed[name])
    done = scene.computed[first]
    assert done < len(PROMPT)
    scene.kill(first)
    scene.finish()
    again = sum(scene.computed.values()) - done - (len(PROMPT) - done) - (NUM - 1)
    assert again <= 16 + BLOCK_SIZE, f"{again} tokens were computed twice, {done} had been computed"


def test_a_source_that_dies_after_its_last_word_costs_nothing_at_all() -> None:
    scene = Scene()
    scene.start("prefill-0", "prefill-1", "decode-0")
    victims = ("prefill-0", "prefill-1")
    scene.run(lambda: max(scene.computed.values(), default=0) == len(PROMPT))
    first = max(victims, key=lambda name: scene.computed[name])
    link = scene.router.link_to(scene.world.workers[WorkerId("decode-0")])
    assert link is not None
    says = link._up
    assert says is not None
    says.hold()  # the target's commit is on the way
    scene.run(lambda: scene.num_seen() >= 1)
    scene.kill(first)
    assert scene.request().state is RequestState.ORPHANED
    says.let_go()
    scene.finish()
    assert sum(scene.computed.values()) == len(PROMPT) + NUM - 1
    assert scene.request().num_replacements == 0
