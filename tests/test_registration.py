"""torch's own checks of every operator: schema, fake kernel, autograd registration, tracing.

opcheck cannot see second derivatives; gradgradcheck, or a refusal by name, is tested beside each engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

# name of the operator -> its sample inputs for a device. Every operator in the library must stand here.
SAMPLES: dict[str, Callable[[torch.device], list[tuple[Any, ...]]]] = {}


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_opcheck(name: str, device: torch.device) -> None:
    for sample in SAMPLES[name](device):
        torch.library.opcheck(getattr(torch.ops.wgan_ext, name).default, sample)


def test_every_operator_has_samples() -> None:
    registered = {
        schema.name.removeprefix("wgan_ext::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("wgan_ext::")
    }
    assert registered == set(SAMPLES)
