"""Whether a browser's request comes from the dashboard's own page, or from another site that the operator looks at.

API keys travel in a header that the page sets itself, so no other site can send one. What remains is a cluster without
keys, where reaching the port is all it takes: there a site could ask the browser of somebody on the machine, at its
address or under a name that it points there.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

MARK = "x-tandem-dashboard"  # another site may set it only after asking, which is never answered with a yes


def objection(headers: Mapping[str, Sequence[str]], *, acts: bool, names_allowed: bool) -> str | None:
    """Why the request is not answered; None: it is. `headers`: by their lower-case names.

    `acts`: it changes something. `names_allowed`: something else than the address proves who may come, keys or TLS.
    """
    hosts = headers.get("host", ())
    if len(hosts) != 1:
        return f"host: came {len(hosts)} times, must come once"
    if list(headers.get(MARK, ())) != ["1"]:
        return f"{MARK}: must be 1, as the dashboard's own page sends it"
    sites = headers.get("sec-fetch-site", ())
    if any(site != "same-origin" for site in sites):
        return f"sec-fetch-site: is {', '.join(sites)}: another site asks"
    for origin in headers.get("origin", ()):
        if origin not in (f"http://{hosts[0]}", f"https://{hosts[0]}"):
            return "origin: is another site's"
    if acts and [each.partition(";")[0].strip() for each in headers.get("content-type", ())] != ["application/json"]:
        return "content-type: must be application/json"
    if not names_allowed and not is_address(hosts[0]):
        return (
            "host: without API keys and TLS the dashboard answers at an address or localhost alone: "
            "any site could give the address a name of its own"
        )
    return None


def is_address(host: str) -> bool:
    """Whether a Host header names an IP address or localhost, with or without a port."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name == "localhost" or name.endswith(".localhost"):
            return True
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
