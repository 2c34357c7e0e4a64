"""One target under atheris, a coverage-guided fuzzer: `python tests/fuzz/guided.py TARGET TALLY [libFuzzer flags]`.

Every second the file TALLY says how many inputs there were and how many things they held. An input that breaks a
promise, hangs for 20 seconds or takes two gigabytes ends the process with the input in a file and another exit status.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import atheris

TALLY_S = 1.0
PACKAGES = ["tandem", "engine", "kv_transfer", "prefill_worker", "decode_worker", "router", "cluster"]


def main(arguments: list[str]) -> None:
    """Does not return: libFuzzer ends the process."""
    name, tally, *flags = arguments
    with atheris.instrument_imports(include=PACKAGES):
        from targets import targets

        target = targets()[name]
    path = Path(tally)
    counts = {"inputs": 0, "held": 0}
    written_s = 0.0

    def one(data: bytes) -> None:
        nonlocal written_s
        counts["held"] += target.run(data)
        counts["inputs"] += 1
        now_s = time.monotonic()
        if now_s - written_s >= TALLY_S:
            written_s = now_s
            path.write_text(json.dumps(counts))

    limits = ["-timeout=20", "-rss_limit_mb=2048", f"-max_len={target.bytes_max}"]
    atheris.Setup([sys.argv[0], *limits, *flags], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
