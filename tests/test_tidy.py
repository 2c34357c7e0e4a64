"""The rules of the house as a test: layers, purity, sizes, docstrings, what may not be said or tracked."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Imports point down only. Folders of one rank are siblings that do not know one another.
LAYERS: dict[str, int] = {
    "cli": 9,
    "benchmarks": 8,
    "simulator": 7,
    "cluster": 6,
    "router": 5,
    "prefill_worker": 5,
    "decode_worker": 5,
    "kv_transfer": 4,
    "engine": 3,
    "kernels": 2,
    "tandem": 1,
}

# Deciders: they take events with the time in them and return actions; they import nothing that can block, wait,
# draw a random number or read a clock.
PURE = {
    "tandem/errors.py",
    "tandem/messages.py",
    "tandem/metrics.py",
    "tandem/near_miss.py",
    "tandem/request.py",
    "tandem/resuming.py",
    "engine/arch.py",
    "engine/blocks.py",
    "engine/events.py",
    "engine/layout.py",
    "engine/noise.py",
    "engine/prefix_cache.py",
    "engine/pressure.py",
    "engine/sequence.py",
    "engine/step.py",
    "engine/swap_space.py",
    "engine/swapping.py",
    "engine/tensor_shapes.py",
    "kv_transfer/actions.py",
    "kv_transfer/exports.py",
    "kv_transfer/handoff.py",
    "kv_transfer/handoff_source.py",
    "kv_transfer/handoff_target.py",
    "kv_transfer/agent_attempts.py",
    "kv_transfer/agent_settings.py",
    "kv_transfer/endpoint.py",
    "kv_transfer/frame_queue.py",
    "kv_transfer/layout.py",
    "kv_transfer/messages.py",
    "kv_transfer/migration_source.py",
    "kv_transfer/plan.py",
    "kv_transfer/source_end.py",
    "prefill_worker/config.py",
    "prefill_worker/core.py",
    "prefill_worker/queue.py",
    "decode_worker/admission.py",
    "decode_worker/config.py",
    "decode_worker/core.py",
    "decode_worker/moving.py",
    "decode_worker/request.py",
    "decode_worker/reserving.py",
    "router/admission.py",
    "router/api_keys.py",
    "router/attempts.py",
    "router/commit.py",
    "router/config.py",
    "router/core.py",
    "router/cost.py",
    "router/detokenizer.py",
    "router/events.py",
    "router/fleet.py",
    "router/history.py",
    "router/key_limits.py",
    "router/lately.py",
    "router/line.py",
    "router/move.py",
    "router/moves.py",
    "router/outbox.py",
    "router/owners.py",
    "router/placement.py",
    "router/prefix_index.py",
    "router/recent.py",
    "router/recovery.py",
    "router/request.py",
    "router/transcripts.py",
    "router/validation.py",
    "router/store.py",
    "cluster/boards.py",
    "cluster/chaos_audit.py",
    "cluster/chaos_plan.py",
    "cluster/chaos_report.py",
    "cluster/chaos_states.py",
    "cluster/chaos_tally.py",
    "cluster/dashboard_frames.py",
    "cluster/dashboard_view.py",
    "cluster/documents.py",
    "cluster/memory.py",
    "cluster/membership.py",
    "cluster/draining.py",
    "cluster/drain_relay.py",
    "cluster/same_origin.py",
    "cluster/silence.py",
    "cluster/standing.py",
    "cluster/top.py",
    "cluster/turns.py",
    "cluster/verdicts.py",
    "cluster/observer.py",
    "cluster/outlook.py",
    "cluster/panels.py",
    "cluster/pool_events.py",
    "cluster/ray_watch.py",
    "cluster/readiness.py",
    "cluster/rebalancer.py",
    "cluster/restarts.py",
    "cluster/worker_core.py",
}
IMPURE_MODULES = {
    "asyncio", "concurrent", "ctypes", "grpc", "logging", "mmap", "multiprocessing", "os", "random", "ray", "redis",
    "secrets", "select", "signal", "socket", "subprocess", "threading", "time", "torch", "uuid",
}  # fmt: skip

RAY_ONLY_IN = {
    "cluster/actors.py", "cluster/lean_ray.py", "cluster/pools.py", "cluster/ray_room.py", "cluster/ray_session.py",
}  # fmt: skip
LINES_MAX = 600
FUNCTION_LINES_MAX = 70
GENERATED = re.compile(r"_pb2(_grpc)?\.pyi?$")


class Violation(AssertionError):
    """One broken rule, with its place."""


def tracked(suffix: str = "") -> list[str]:
    """Files that git tracks or would track, relative to the root."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    return sorted(name for name in listing if name.endswith(suffix) and (ROOT / name).is_file())


def imports_of(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every module imported anywhere in the tree, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield node.module, node.lineno


def check_layers(name: str, source: str) -> None:
    """Raises Violation when a module imports from its own rank's sibling or from above."""
    package = name.split("/")[0]
    rank = LAYERS.get(package)
    if rank is None:
        return
    for module, line in imports_of(ast.parse(source)):
        other = module.split(".")[0]
        if other == package or other not in LAYERS:
            continue
        if LAYERS[other] >= rank:
            raise Violation(f"{name}:{line} imports {module}: imports point down only")


def check_purity(name: str, source: str) -> None:
    """Raises Violation when a decider imports something that acts."""
    for module, line in imports_of(ast.parse(source)):
        if module.split(".")[0] in IMPURE_MODULES:
            raise Violation(f"{name}:{line} imports {module}: a decider does not act")


def check_ray(name: str, source: str) -> None:
    """Raises Violation when Ray is imported where it may not be."""
    if name in RAY_ONLY_IN or name.startswith("tests/"):
        return
    for module, line in imports_of(ast.parse(source)):
        if module.split(".")[0] == "ray":
            raise Violation(f"{name}:{line} imports ray: only {sorted(RAY_ONLY_IN)} may")


def check_sizes(name: str, source: str) -> None:
    """Raises Violation when a file or a function is too long."""
    num_lines = source.count("\n")
    if num_lines > LINES_MAX:
        raise Violation(f"{name} has {num_lines} lines, at most {LINES_MAX}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES_MAX:
                raise Violation(f"{name}:{node.lineno} {node.name} has {length} lines, at most {FUNCTION_LINES_MAX}")


def check_docstring(name: str, source: str) -> None:
    """Raises Violation when a module does not start with a sentence."""
    docstring = ast.get_docstring(ast.parse(source))
    if not docstring or not docstring.splitlines()[0].rstrip().endswith((".", ":", "?")):
        raise Violation(f"{name} does not start with a sentence that says what lives here")


def check_swallowing(name: str, source: str) -> None:
    """Raises Violation for `except Exception: pass` and the bare except."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        broad = node.type is None or (
            isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
        )
        if broad and all(isinstance(part, ast.Pass) for part in node.body):
            raise Violation(f"{name}:{node.lineno} swallows every exception")


def check_pickle(name: str, source: str) -> None:
    """Raises Violation for imports that deserialise code."""
    for module, line in imports_of(ast.parse(source)):
        if module.split(".")[0] in ("pickle", "cloudpickle", "marshal", "dill"):
            raise Violation(f"{name}:{line} imports {module}: no pickle on our wires")


OUR_CODE = [n for n in tracked(".py") if n.split("/")[0] in (*LAYERS, "tests") and not GENERATED.search(n)]
PRODUCT_CODE = [n for n in OUR_CODE if not n.startswith("tests/")]


@pytest.mark.parametrize("name", PRODUCT_CODE)
def test_product_module(name: str) -> None:
    source = (ROOT / name).read_text()
    for check in (check_layers, check_ray, check_sizes, check_docstring, check_swallowing, check_pickle):
        check(name, source)
    if name in PURE:
        check_purity(name, source)


@pytest.mark.parametrize("name", [n for n in OUR_CODE if n.startswith("tests/")])
def test_test_module(name: str) -> None:
    source = (ROOT / name).read_text()
    for check in (check_sizes, check_docstring, check_swallowing):
        check(name, source)


def test_every_decider_exists() -> None:
    """A renamed decider may not slip out of the purity list."""
    missing = sorted(name for name in PURE if not (ROOT / name).is_file())
    assert not missing, f"named as deciders but not there: {missing}"


def test_every_folder_has_its_layer() -> None:
    folders = {n.split("/")[0] for n in tracked(".py") if "/" in n} - {"tests"}
    assert folders <= set(LAYERS), f"folders without a layer: {sorted(folders - set(LAYERS))}"


def test_no_catch_all_names() -> None:
    banned = {"utils", "util", "common", "helpers", "helper", "misc"}
    found = [n for n in tracked(".py") if banned & set(Path(n).with_suffix("").parts)]
    assert not found, f"name the noun instead: {found}"


def test_proto_is_no_python_package() -> None:
    assert not tracked(".py") or not [n for n in tracked(".py") if n.startswith("proto/")]


def test_nothing_large_or_binary_is_tracked() -> None:
    large = [n for n in tracked() if (ROOT / n).stat().st_size > 1_000_000]
    assert not large, f"over 1 MB: {large}"


def test_generated_code_is_what_the_protocol_says(tmp_path: Path) -> None:
    """The committed stubs are those that `make proto` writes."""
    tools = pytest.importorskip("grpc_tools.protoc")
    import grpc_tools

    include = str(Path(grpc_tools.__file__).parent / "_proto")
    protos = [str(ROOT / name) for name in tracked(".proto")]
    outputs = [f"--{kind}={tmp_path}" for kind in ("python_out", "grpc_python_out", "pyi_out")]
    assert tools.main(["protoc", f"-I{ROOT / 'proto'}", f"-I{include}", *outputs, *protos]) == 0
    for made in sorted((tmp_path / "tandem" / "v1").iterdir()):
        committed = ROOT / "tandem" / "v1" / made.name
        assert committed.read_text() == made.read_text(), f"{committed.name} is stale: make proto"


PLANTED = [
    (check_layers, "engine/x.py", "from router.core import RouterCore\n", "point down only"),
    (check_layers, "router/x.py", "import prefill_worker.core\n", "point down only"),
    (check_purity, "router/core.py", "import time\n", "does not act"),
    (check_purity, "engine/blocks.py", "def f():\n    import torch\n", "does not act"),
    (check_ray, "router/x.py", "import ray\n", "imports ray"),
    (check_sizes, "engine/x.py", "x = 1\n" * 601, "601 lines"),
    (check_sizes, "engine/x.py", "def f():\n" + "    x = 1\n" * 70, "71 lines"),
    (check_docstring, "engine/x.py", "x = 1\n", "sentence"),
    (check_docstring, "engine/x.py", '"""helpers"""\n', "sentence"),
    (check_swallowing, "engine/x.py", "try:\n    f()\nexcept Exception:\n    pass\n", "swallows"),
    (check_pickle, "engine/x.py", "import pickle\n", "pickle"),
]


@pytest.mark.parametrize(("check", "name", "source", "message"), PLANTED)
def test_planted_violation_is_found(check: object, name: str, source: str, message: str) -> None:
    assert callable(check)
    with pytest.raises(Violation, match=message):
        check(name, source)
