"""Whether what is installed beside Tandem leaves it whole."""

from __future__ import annotations

from importlib.metadata import distributions


def clash() -> str | None:
    """Which installed distribution hides a part of Tandem, for people; None: all is well.

    To be asked before anything of the package `kernels` is imported: the other one comes first on the path.
    """
    if any(each.name == "kernels" for each in distributions(name="kernels")):
        return "the distribution `kernels` is installed, whose name hides a part of Tandem: pip uninstall kernels"
    return None
