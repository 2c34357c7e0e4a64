"""Which browser requests the dashboard answers: its own page's, and those of no other site."""

from __future__ import annotations

import pytest

from cluster.same_origin import is_address, objection

HERE = {"host": ["127.0.0.1:8000"], "x-tandem-dashboard": ["1"]}
ACTS = {
    **HERE,
    "content-type": ["application/json"],
    "origin": ["http://127.0.0.1:8000"],
    "sec-fetch-site": ["same-origin"],
}


def test_the_own_page_is_answered() -> None:
    assert objection(HERE, acts=False, names_allowed=False) is None
    assert objection(ACTS, acts=True, names_allowed=False) is None
    assert (
        objection({**ACTS, "content-type": ["application/json; charset=utf-8"]}, acts=True, names_allowed=False) is None
    )
    assert objection({**HERE, "host": ["tandem.example"]}, acts=False, names_allowed=True) is None


REFUSED = [
    ({"x-tandem-dashboard": []}, "x-tandem-dashboard: must be 1"),  # a form or an image of another site
    ({"x-tandem-dashboard": ["1", "1"]}, "x-tandem-dashboard: must be 1"),
    ({"origin": ["http://evil.example"]}, "origin: is another site's"),
    ({"origin": ["null"]}, "origin: is another site's"),
    ({"origin": ["http://127.0.0.1:9000"]}, "origin: is another site's"),
    ({"sec-fetch-site": ["cross-site"]}, "another site asks"),
    ({"sec-fetch-site": ["same-site"]}, "another site asks"),
    ({"sec-fetch-site": ["none"]}, "another site asks"),
    ({"content-type": ["text/plain"]}, "content-type: must be application/json"),
    ({"content-type": []}, "content-type: must be application/json"),
    ({"host": []}, "host: came 0 times"),
    ({"host": ["127.0.0.1:8000", "x"]}, "host: came 2 times"),
    ({"host": ["evil.example:8000"], "origin": ["http://evil.example:8000"]}, "a name of its own"),  # DNS rebinding
]


@pytest.mark.parametrize(("differs", "words"), REFUSED)
def test_other_sites_are_refused_by_name(differs: dict[str, list[str]], words: str) -> None:
    refused = objection({**ACTS, **differs}, acts=True, names_allowed=False)
    assert refused is not None
    assert words in refused


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:8000", "10.1.2.3:80", "[::1]:8000", "localhost:8000", "a.localhost"]
)
def test_an_address_is_one(host: str) -> None:
    assert is_address(host)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil.example:80",
        "",
        "[::1",
        "a@b",
        "127.0.0.1@evil.example",
    ],
)
def test_a_name_is_none(host: str) -> None:
    assert not is_address(host)
