"""On the path of a cluster under test: an engine whose process id is in the folder WEDGE_DIR hangs in its next step."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

WEDGED = "engine.fake_runner"


class Wedge(MetaPathFinder):
    """Changes the fake runner as it is imported, and nothing else."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != WEDGED:
            return None
        spec = PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            run = module.FakeRunner.run
            mine = Path(os.environ["WEDGE_DIR"]) / str(os.getpid())

            def hang(runner: object, plan: object) -> object:
                while mine.exists():
                    time.sleep(0.02)
                return run(runner, plan)

            module.FakeRunner.run = hang

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Wedge())
