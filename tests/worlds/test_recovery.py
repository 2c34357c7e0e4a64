"""What a request that lost a worker computes again: no more than what nobody holds any more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.fake_runner import expected_tokens
from engine.step import StepPlan
from router.events import NewRequest, Submitted, WorkerLost
from router.request import RequestState
from simulator.choices import Choices
from simulator.worker import VirtualWorker
from simulator.world import BLOCK_SIZE, VOCAB_SIZE, World
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

    def start(self, *workers: str) -> None:
        for name in workers:
            self.world.start_worker(WorkerId(name), Role(name.split("-")[0]))
            self.count(self.world.workers[WorkerId(name)])
        self.world._tick()
        self.run(lambda: all(self.world._is_heard(each) for each in self.world.workers.values()))
        request = NewRequest(request_id=R, tokens=PROMPT, sampling=GREEDY)
        self.world.checks.submitted(request, healthy=True)
        self.world.feed(Submitted(request=request))

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
        lost = WorkerLost(worker_id=address.worker_id, incarnation=address.incarnation, reason="killed")
        self.world.feed(lost)

    def num_seen(self) -> int:
        return self.world.checks.num_seen(R)

    def finish(self) -> None:
        """The answer is whole, token for token."""
        self.run(lambda: not self.world.checks.unended())
        (expected,) = self.world.checks._requests.values()
        assert expected.seen == expected_tokens(PROMPT, GREEDY, NUM, VOCAB_SIZE)


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
    (says,) = [link.up for key, link in scene.world._links.items() if key[0] == "decode-0"]
    says.hold()  # the target's commit is on the way
    scene.run(lambda: scene.num_seen() >= 1)
    scene.kill(first)
    assert scene.world.router.status(scene.world.clock.now_ms).requests[0].state is RequestState.ORPHANED
    says.let_go()
    scene.finish()
    assert sum(scene.computed.values()) == len(PROMPT) + NUM - 1
    (request,) = scene.world.router.status(scene.world.clock.now_ms).requests
    assert request.num_replacements == 0
