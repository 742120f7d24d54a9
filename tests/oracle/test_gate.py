"""A trained router in one packed batch with chunked prefill, against the module that trains it, run alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from hub.companions import expert_folder
from server.primitives.graft import Graft
from server.primitives.routed_experts import Expert, Route, make_prototypes, why_no_expert
from tests.oracle.conftest import Bench, TinyBase
from tests.oracle.experts import logits, make_expert, prompt
from trainer.modules.attach import put_on, write
from trainer.modules.experts import load_expert
from trainer.modules.router import Router

TOLERANCE = 1e-4  # fp32; the packed products sum in another order
RANKS = (4, 2, 7, 1)
ALPHAS = {"o_proj": 5, "c_proj": 5}
STEP = 0.05  # an optimizer step that is seen in the logits

pytestmark = pytest.mark.filterwarnings("ignore")


def routed_model(base: TinyBase, folders: Sequence[Path], *, top_k: int, seed: int) -> Any:
    """The training module in evaluation, its rows random and far from even."""
    model = base.fresh()
    experts = [load_expert(model, folder, folder.name) for folder in folders]
    pins = [f"expert-{n}@sha256:{n:064x}" for n in range(len(folders))]
    config = {"peft_type": "LORA_MOE", "experts": pins, "top_k": top_k, "router_aux_loss_coef": 0.01}
    graft = put_on(model, Router(model, config, experts))
    torch.manual_seed(seed)
    graft.fill({name: 0.5 * torch.randn_like(value) for name, value in graft.tensors().items()})
    return model.eval()


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_a_served_router_equals_its_training_module_alone(
    architecture: str, tiny_base: Callable[[str], TinyBase], bench: Callable[[str], Bench], tmp_path: Path
) -> None:
    base, rig = tiny_base(architecture), bench(architecture)
    folders = [make_expert(base, tmp_path / f"{n}", seed=n, rank=rank) for n, rank in enumerate(RANKS)]
    grafts = [rig.graft(folder, "lora") for folder in folders]
    assert [why_no_expert(graft, rig.network.facts.decoder_layers) for graft in grafts] == [None] * len(grafts)
    requests: list[tuple[list[int], list[tuple[Graft, float]]]] = []
    routes: dict[int, Route] = {}
    expected = []
    # Two routers, one over some of the experts in another order.
    for seed, (chosen, top_k) in enumerate([([0, 1, 2, 3], 2), ([3, 1, 0], 3), ([0, 1, 2, 3], 2)]):
        model = routed_model(base, [folders[k] for k in chosen], top_k=top_k, seed=seed)
        saved = tmp_path / f"router-{seed}"
        saved.mkdir()
        write(model.graft, saved, "tiny")
        lowered = rig.graft(saved, "lora-moe")
        router = Graft(f"router-{seed}", "r@1", router=lowered.router, experts=tuple(grafts[k].digest for k in chosen))
        assert router.router is not None and router.router.top_k == top_k
        routes[seed] = Route(tuple(Expert(grafts[k]) for k in chosen), top_k, 1.0, router)
        requests.append((prompt(seed, 9 + 6 * seed), []))
        expected.append(logits(model, requests[seed][0]))
    arrow = Route(tuple(Expert(graft, make_prototypes(graft)) for graft in grafts[:3]), 2, 1.0)
    others = [(prompt(30, 11), [(grafts[0], 0.5), (grafts[2], -1.0)]), (prompt(31, 8), []), (prompt(32, 12), [])]
    got = rig.run([*requests, *others], routes={**routes, 5: arrow})
    plain = rig.run([*requests, *others])
    alone = rig.run([others[2]], routes={0: arrow})
    for seed, logits_TV in enumerate(expected):
        error = (got[seed] - logits_TV).abs().max().item()
        assert error < TOLERANCE, f"router {seed} on {architecture} differs by {error:.1e}"
        assert (logits_TV - plain[seed]).abs().max().item() > 100 * TOLERANCE, "the router has no visible effect"
    for n in (3, 4):
        assert torch.equal(got[n], plain[n]), "a request that is not routed changed beside routed ones"
    torch.testing.assert_close(got[5], alone[0], atol=TOLERANCE, rtol=0)  # arrow beside gate in one step


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_served_router_equals_the_module_that_trained_its_experts_with_it(
    architecture: str, tiny_base: Callable[[str], TinyBase], bench: Callable[[str], Bench], tmp_path: Path
) -> None:
    """Against the module as training left it, never saved: what is served are the router's and the experts' files."""
    base, rig = tiny_base(architecture), bench(architecture)
    model = base.fresh()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    options: list[dict[str, Any]] = [
        {"rank": 4},
        {"rank": 3, "use_rslora": True},
        {"rank": 2, "alpha_pattern": ALPHAS},
    ]
    folders = [make_expert(base, tmp_path / f"{n}", seed=n, **chosen) for n, chosen in enumerate(options)]
    experts = [load_expert(model, folder, folder.name) for folder in folders]
    names = [f"expert-{n}" for n in range(len(experts))]
    config = {
        "peft_type": "LORA_MOE", "experts": [f"{name}@sha256:{n:064x}" for n, name in enumerate(names)], "top_k": 2,
        "router_aux_loss_coef": 0.01, "experts_are": "trained", "expert_names": names, "expert_rate": 0.5,
    }  # fmt: skip
    graft = put_on(model, Router(model, config, experts))
    torch.manual_seed(0)
    graft.fill({name: 0.5 * torch.randn_like(value) for name, value in graft.tensors().items()})
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=STEP)
    ids_BT = torch.tensor([prompt(9, 12), prompt(10, 12)])
    for _ in range(3):
        model.train()(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), labels=ids_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    write(graft, tmp_path, "tiny")
    graft.write_experts(tmp_path, "tiny")
    before = [rig.graft(folder, "lora") for folder in folders]
    after = [rig.graft(expert_folder(tmp_path, name), "lora") for name in names]
    router = Graft(
        "router", "r@1", router=rig.graft(tmp_path, "lora-moe").router, experts=tuple(g.digest for g in after)
    )
    requests: list[tuple[list[int], list[tuple[Graft, float]]]] = [(prompt(n, 9 + 4 * n), []) for n in range(3)]
    route = Route(tuple(Expert(graft) for graft in after), 2, 1.0, router)
    got = rig.run(requests, routes={0: route, 2: route})
    old = Graft("old", "r@0", router=router.router, experts=tuple(one.digest for one in before))
    untrained = rig.run(requests, routes={0: Route(tuple(Expert(graft) for graft in before), 2, 1.0, old)})
    for n in (0, 2):
        error = (got[n] - logits(model.eval(), requests[n][0])).abs().max().item()
        assert error < TOLERANCE, f"differs by {error:.1e}"
    assert (got[0] - untrained[0]).abs().max().item() > 100 * TOLERANCE, "training moved no expert visibly"
    assert torch.equal(got[1], rig.run(requests)[1])
