"""The element types that the C kernels know, and the numbers by which they know them."""

from __future__ import annotations

import torch

# cpu/lanes.h: FLOAT32, BFLOAT16, FLOAT16
CODES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def code(dtype: torch.dtype, name: str) -> int:
    """The number of a type. Raises ValueError naming the argument for any other."""
    found = CODES.get(dtype)
    if found is None:
        raise ValueError(f"{name} is {dtype}, must be one of {list(CODES)}")
    return found
