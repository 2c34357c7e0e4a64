"""The HTTP API against its own document: requests that schemathesis makes of it, each answer held to what it says.

`python tests/fuzz/http_cases.py URL METHOD PATH NUM SEED` prints how many got which status, as JSON. Half of the
requests keep the schema, half break it. All checks of schemathesis are on: an undocumented status, body, header or
content type, a server error, a valid request refused or an invalid one taken end it with the request.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from typing import Any

import http_hooks  # noqa: F401  (registers itself)
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

TIMEOUT_S = 30.0
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)


def run(url: str, method: str, path: str, num: int, first_seed: int) -> Counter[int]:
    """`num` requests to one operation; how many got which status. Raises what the first broken check says."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operation = schema[path][method]
    statuses: Counter[int] = Counter()
    for number, mode in enumerate(MODES):

        @seed(first_seed + number)
        @settings(
            max_examples=max(1, num // len(MODES)), phases=[Phase.generate], deadline=None, database=None,
            suppress_health_check=[*HealthCheck],
        )  # fmt: skip
        @given(case=operation.as_strategy(generation_mode=mode))
        def one(case: schemathesis.Case[Any]) -> None:
            response = case.call(timeout=TIMEOUT_S)
            statuses[response.status_code] += 1
            case.validate_response(response)

        with contextlib.suppress(Unsatisfiable):  # nothing that could be wrong about a path
            one()
    return statuses


if __name__ == "__main__":
    address, verb, route, how_many, begin = sys.argv[1:]
    print(json.dumps(run(address, verb, route, int(how_many), int(begin))))
