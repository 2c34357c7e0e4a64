"""The fence of a request's life leads all of its epochs."""

from __future__ import annotations

import pytest
from router_rig import Rig, request

from router.config import RouterConfig
from router.events import Submitted
from router.move import EPOCHS_PER_FENCE
from tandem.messages import Assign, Role


def test_a_life_of_a_request_brings_its_own_epochs() -> None:
    """Another router's epochs may be above all of this core's: the fence of the life that began last leads."""
    rig = Rig()
    rig.up("p0", Role.PREFILL)
    rig.up("d0", Role.DECODE)
    rig.feed(Submitted(request=request(), first_epoch=9 * EPOCHS_PER_FENCE, taken_over=True))
    assert {assign.epoch for _, assign in rig.sent(Assign)} == {9 * EPOCHS_PER_FENCE}


def test_the_placements_of_a_life_fit_under_its_fence() -> None:
    with pytest.raises(ValueError, match="replacements_max: is 16, must be below 16"):
        RouterConfig(replacements_max=16)
