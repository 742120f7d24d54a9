"""Linears that read the same input, where adapters change it for some tokens of one Linear, others of the other."""

from __future__ import annotations

import pytest
import torch

from server.kernels import native
from server.kernels.products import Plain, Product, Tiled
from server.model.grafted import Joint, Member, gates_of_all
from server.primitives.bias import Bias
from server.primitives.gates import Gates
from server.primitives.rotate import Rotate
from server.primitives.scale import Scale
from server.primitives.site import Active, SiteValue, apply_site, pack_site

TOKENS, IN, WIDTHS = 5, 64, (20, 12)
BOTH = [pytest.param(Plain, id="plain")]
if native.LIBRARY is not None:
    BOTH.append(pytest.param(Tiled, id="tiles"))


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("kind", BOTH)
def test_each_linear_has_its_own_changed_inputs(kind: type[Plain | Tiled], alone: bool) -> None:
    """Beside another, or by itself."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng).bfloat16()

    weight_OI, x_TI = normal(sum(WIDTHS), IN), normal(TOKENS, IN)
    members = [Member("a", 0, WIDTHS[0], None), Member("b", WIDTHS[0], sum(WIDTHS), None)]
    if alone:
        weight_OI, members = weight_OI[: WIDTHS[0]].contiguous(), members[:1]
    values = {
        "a": [(0, SiteValue(scale_in=Scale(normal(IN)))), (1, SiteValue(scale_out=Scale(normal(WIDTHS[0]))))],
        "b": [
            (0, SiteValue(rotate_in=Rotate(normal(IN // 16, 16, 16)), bias=Bias(normal(WIDTHS[1])))),
            (1, SiteValue(scale_in=Scale(normal(IN)), scale_out=Scale(normal(WIDTHS[1])))),
        ],
    }
    gates_TK = torch.tensor([[1.0, 0], [0, 0], [0, 0.5], [0.25, -1], [0, 1]])
    active = Active({name: pack_site(own) for name, own in values.items()}, gates=Gates(gates_TK.bfloat16()))
    product: Product = kind(weight_OI)
    outputs = Joint(0, members, product, active, gates_of_all).compute(x_TI)
    for member, y_TO in zip(members, outputs, strict=True):
        own: Product = kind(weight_OI[member.first : member.end].contiguous())
        assert active.gates is not None
        expected = apply_site(x_TI, active.gates, active.operands[member.name], own, None)
        torch.testing.assert_close(y_TO, expected, atol=2**-6, rtol=2**-6)
        assert torch.equal(y_TO[1], product(x_TI)[1, member.first : member.end])
