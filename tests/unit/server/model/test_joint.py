"""Linears that read the same input, where adapters change it for some tokens of one Linear, others of the other."""

from __future__ import annotations

import pytest
import torch

from server.adapters.bank import Bank
from server.kernels import native
from server.kernels.products import Panels, Plain, Product, Tiled
from server.model.grafted import Joint, Member, gates_of_all
from server.primitives.bias import Bias
from server.primitives.gates import Gates
from server.primitives.graft import Graft
from server.primitives.rotate import Rotate
from server.primitives.scale import Scale
from server.primitives.site import Active, SiteValue, apply_site, pack_site

TOKENS, IN, WIDTHS = 5, 64, (20, 12)
KINDS = [pytest.param(Plain, id="plain")]
if native.LIBRARY is not None:
    KINDS += [pytest.param(Tiled, id="tiles"), pytest.param(Panels, id="panels")]
built = pytest.mark.skipif(native.LIBRARY is None, reason="no C compiler was at hand when this was installed")


@pytest.mark.parametrize("in_place", [False, pytest.param(True, marks=built)])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_each_linear_has_its_own_changed_inputs(
    kind: type[Plain | Tiled | Panels], alone: bool, in_place: bool
) -> None:
    """Beside another, or by itself; what adapters do by torch's operations, or by the native kernels."""
    rng = torch.Generator().manual_seed(0)
    dtype = torch.float32 if kind is Panels else torch.bfloat16

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng).bfloat16().to(dtype)

    weight_OI, x_TI = normal(sum(WIDTHS), IN).bfloat16(), normal(TOKENS, IN)
    members = [Member("a", 0, WIDTHS[0], None, 0), Member("b", WIDTHS[0], sum(WIDTHS), None, 1)]
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
    operands = {name: pack_site(own) for name, own in values.items()}
    active = Active(operands, gates=Gates(gates_TK.to(dtype)))
    if in_place:
        by_column = [{name: value for name, own in values.items() for k, value in own if k == n} for n in range(2)]
        grafts = [Graft(f"{n}", f"{n}@1", sites) for n, sites in enumerate(by_column)]
        bank = Bank(dtype, [("a", "b")], {"a": 0, "b": 1})
        bank.activate(grafts)
        active = Active(bank.operands, bank.gathered, active.gates)
        assert not bank.operands
    product: Product = kind(weight_OI)
    outputs = Joint(0, members, product, active, gates_of_all).compute(x_TI)
    for member, y_TO in zip(members, outputs, strict=True):
        own: Product = kind(weight_OI[member.first : member.end].contiguous())
        assert active.gates is not None
        expected = apply_site(x_TI, active.gates, operands[member.name], own, None)
        torch.testing.assert_close(y_TO, expected, atol=2**-3 if in_place else 2**-6, rtol=2**-6)
        assert torch.equal(y_TO[1], product(x_TI)[1, member.first : member.end])
