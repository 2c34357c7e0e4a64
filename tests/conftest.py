"""What all tests share: threads, what may not be skipped, and that no process outlives its test."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported anywhere: several spinning OpenMP threads on few cores slow each other 10 to 100 times.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import pytest
from hypothesis import HealthCheck, settings
from order_of_tests import turn

settings.register_profile("tandem", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tandem")

RUN_VARIABLE = "TEST_RUN_FOLDER"  # a folder that the processes of this run share, where there are several

# Names of markers, comma separated, whose tests must run: a skip of one of them is a failure. "all" names every test.
REQUIRED = set(filter(None, os.environ.get("TANDEM_REQUIRE", "").split(",")))


# Folders and files whose tests look at no clock and start no process: tests/run_all.py runs them behind others.
COMPUTES = {
    "worlds", "machines", "test_blocks", "test_fake_runner", "test_kernels_copy", "test_kernels_elementwise",
    "test_model_families", "test_model_files", "test_model_smollm2", "test_not_finite", "test_rebalancer",
    "test_router_attack", "test_runner_exact", "test_sampler", "test_step", "test_step_rows", "test_step_under_way",
    "test_swapping_model", "test_tokenizer", "test_weights", "test_wire", "test_worlds_state",
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what only computes."""
    for item in items:
        if {item.path.stem, item.path.parent.name} & COMPUTES:
            item.add_marker("computes")


def pytest_addoption(parser: pytest.Parser) -> None:
    """What only a person asks for."""
    parser.addoption("--screenshots", metavar="FOLDER", help="take the documentation's pictures of the dashboard")


def pytest_configure(config: pytest.Config) -> None:
    """The first process of the run makes the folder that the others inherit the name of."""
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="tandem-test-run-")
        config.add_cleanup(folder.cleanup)
        os.environ[RUN_VARIABLE] = folder.name


@pytest.hookimpl(hookwrapper=True, tryfirst=True)  # before the test's time runs
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Lets tests of real processes that are held to seconds, or flood a cluster, run with no other such test beside."""
    folder = os.environ.get(RUN_VARIABLE)
    if folder is None or item.path.parent.name != "integration":
        yield
        return
    with turn(Path(folder), alone=item.get_closest_marker("alone") is not None):
        yield


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Turns the skip of a required test into a failure."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.skipped and not hasattr(report, "wasxfail"):
        names = {marker.name for marker in item.iter_markers()} | {"all"}
        if REQUIRED & names:
            report.outcome = "failed"
            report.longrepr = f"skipped although TANDEM_REQUIRE asks for it: {report.longrepr}"


@pytest.fixture
def no_process_left() -> Iterator[None]:
    """Fails when a child process of this one, or of its children, outlives the test."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    yield
    left = [process for process in psutil.Process().children(recursive=True) if process.pid not in before]
    _, alive = psutil.wait_procs(left, timeout=10)
    assert not alive, f"still running: {[(p.pid, p.name()) for p in alive]}"
