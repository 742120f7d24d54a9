"""A whole server without HTTP: a tiny random base, a hub on disk, the engine thread, the adapter store."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import safetensors.torch
import torch
from peft import (
    AdaLoraConfig,
    BeftConfig,
    BOFTConfig,
    C3AConfig,
    DeloraConfig,
    FourierFTConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    RoadConfig,
    ShiraConfig,
    VeraConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hub.base import describe_base
from hub.registry import LocalHub
from server.adapters.lowering.target import Target
from server.adapters.source import Source
from server.adapters.store import AdapterStore
from server.config import AdapterConfig, EngineConfig, ModelConfig
from server.engine.loop import EngineLoop, EventStream
from server.metrics import Metrics
from server.model.load import load_network
from server.model.network import Network
from server.records import Event, Failed, Finished, GenerationRequest, Sampled, Sampling

VOCABULARY = 96
T = TypeVar("T")


def make_base(folder: Path, *, hidden: int = 32, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,  # of 16: what the native attention takes, so that its decoder is what is tested
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    "lora-16": lambda: LoraConfig(r=16, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "lora-head": lambda: LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"),
    "dora": lambda: LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    "alora": lambda: LoraConfig(
        r=4, alora_invocation_tokens=[7], target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    ),
    "adalora": lambda: AdaLoraConfig(init_r=4, total_step=9, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "vera": lambda: VeraConfig(r=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    "loha": lambda: LoHaConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "hra": lambda: HRAConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "miss": lambda: MissConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "delora": lambda: DeloraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "beft": lambda: BeftConfig(target_modules=["v_proj"], task_type="CAUSAL_LM"),
    "ia3": lambda: IA3Config(target_modules=["v_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    "ia3-in": lambda: IA3Config(target_modules=["v_proj"], feedforward_modules=["v_proj"], task_type="CAUSAL_LM"),
    "oft": lambda: OFTConfig(oft_block_size=8, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "boft": lambda: BOFTConfig(boft_block_size=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "road": lambda: RoadConfig(group_size=8, target_modules=["v_proj"], task_type="CAUSAL_LM"),
    "shira": lambda: ShiraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"),
    "lokr": lambda: LoKrConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "fourierft": lambda: FourierFTConfig(
        n_frequency=30, scaling=99.0, target_modules=["q_proj"], task_type="CAUSAL_LM"
    ),
    "c3a": lambda: C3AConfig(block_size=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "hira": lambda: HiraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=7, task_type="CAUSAL_LM"),
}


def make_adapter(base: Path, kind: str, folder: Path, *, seed: int, factor: float = 1.0) -> Path:
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), CONFIGS[kind]())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = factor * (parameter.data + 0.5 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def network(base: Path) -> Network:
    return load_network(ModelConfig(base="tiny", device="cpu"), base, name="tiny")


@pytest.fixture(scope="session")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[tuple[Any, ...], Path] = {}

    def make(kind: str, seed: int = 0, factor: float = 1.0) -> Path:
        key = (kind, seed, factor)
        if key not in made:
            made[key] = make_adapter(base, kind, tmp_path_factory.mktemp("adapter"), seed=seed, factor=factor)
        return made[key]

    return make


@pytest.fixture
def hub(tmp_path: Path) -> LocalHub:
    return LocalHub(tmp_path / "home")


@dataclass
class Rig:
    """The server's inside, and the shortest ways to ask it."""

    engine: EngineLoop
    store: AdapterStore
    hub: LocalHub
    metrics: Metrics
    asked: int = 0
    leases: list[Any] = field(default_factory=list)

    async def submit(
        self,
        prompt: Sequence[int],
        *terms: tuple[str, float],
        new: int = 8,
        sampling: Sampling | None = None,
        **more: Any,
    ) -> EventStream:
        lease = await self.store.acquire(terms)
        self.asked += 1
        request = GenerationRequest(
            request_id=f"request-{self.asked}",
            prompt_ids=tuple(prompt),
            mixture=lease.mixture,
            max_tokens=new,
            sampling=sampling or Sampling(temperature=0.0),
            **more,
        )
        return self.engine.submit(request, lease)

    async def ask(self, prompt: Sequence[int], *terms: tuple[str, float], **more: Any) -> tuple[list[int], Finished]:
        return await collect(await self.submit(prompt, *terms, **more))


async def collect(stream: EventStream) -> tuple[list[int], Finished]:
    """The tokens and the end; raises what the request failed with."""
    tokens: list[int] = []
    async for event in stream:
        if isinstance(event, Sampled):
            tokens.append(event.token_id)
        elif isinstance(event, Failed):
            raise event.error
        elif isinstance(event, Finished):
            return tokens, event
    raise AssertionError("the stream ended without its last event")


async def all_events(stream: EventStream) -> list[Event]:
    return [event async for event in stream]


@pytest.fixture
def rig(network: Network, base: Path, hub: LocalHub) -> Callable[..., Any]:
    """An async context manager; keyword arguments replace fields of the two configurations."""

    @asynccontextmanager
    async def make(*, watch: bool = False, **settings: Any) -> AsyncIterator[Rig]:
        engine_fields = {name: settings.pop(name) for name in list(settings) if hasattr(EngineConfig(), name)}
        engine = EngineLoop(network, replace(EngineConfig(block_size=4, kv_bytes=1 << 22), **engine_fields))
        config = replace(AdapterConfig(), **settings)
        facts = network.facts
        target = Target(
            facts.sites,
            facts.layers,
            facts.hidden_size,
            facts.dtype,
            facts.device,
            config.max_rank,
            config.max_virtual,
            network.weight,
            facts.norms,
            facts.embedding,
            facts.places,
            facts.parameters,
            config.max_delta_error,
            facts.decoder_layers,
        )
        metrics = Metrics()
        source = Source(hub, describe_base(base, name=str(base)), default_alias=config.default_alias)
        store = AdapterStore(source, engine, target, config, metrics, quantized=False)
        engine.start()
        watching = asyncio.create_task(store.watch()) if watch else None
        try:
            yield Rig(engine, store, hub, metrics)
        finally:
            if watching:
                watching.cancel()
            engine.stop()

    return make


@pytest.fixture
def run() -> Iterator[Callable[[Coroutine[Any, Any, T]], T]]:
    def wait(work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run(asyncio.wait_for(work, 120))

    yield wait


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def set_tensor(folder: Path, copy: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of an adapter with other weights."""
    copy.mkdir()
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, copy / "adapter_model.safetensors")
    (copy / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    return copy
