"""`make bench`: every benchmark that needs nothing but this checkout, one after the other."""

from __future__ import annotations

import subprocess
import sys

MODULES = ("kernels", "engine", "transfer", "startup", "disaggregation", "goodput")


def main() -> int:
    """Runs each as its own process, so that none inherits another's threads or memory."""
    failed = [
        name
        for name in MODULES
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=False).returncode != 0
    ]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
