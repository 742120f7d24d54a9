"""LoRA from any of PEFT's initialisations, saved as a plain LoRA of the base as it is.

PiSSA, OLoRA, CorDA and LoRA-GA take their first product off the base's weights: W' = W - s B0 A0. PEFT does that again
whenever such a file is loaded, which would corrupt every other adapter of that base (docs/decisions/0006). What they
compute is W + s (B A - B0 A0): so a LoRA of twice the rank is saved, A over A0 and B beside -B0, and no initialisation.
EVA, CorDA and LoRA-GA are initialised from the first batches of the run.
Law: on the base as it is, the file gives what the trained model gave.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from peft import get_peft_model
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file, save_file
from torch import Tensor, cat, no_grad

from hub.manifest import CONFIG_FILE, WEIGHTS_FILE
from trainer.encode import Encoded
from trainer.errors import BaseUnfit
from trainer.tuner import Batches, PeftTuner

REWRITES: Final = ("pissa", "olora", "corda", "lora_ga")
FACTOR: Final = (".lora_A.default.weight", ".lora_B.default.weight")
SETTINGS: Final = ("eva_config", "corda_config", "lora_ga_config")


def rewrites_the_base(init: Any) -> bool:
    return isinstance(init, str) and init.startswith(REWRITES)


class LoraTuner:
    """As PEFT's other methods, but for how it begins and what is saved."""

    def __init__(self) -> None:
        self._peft = PeftTuner()

    def attach(self, model: Any, config: Any, batches: Batches) -> Any:
        before = BEFORE.get(str(config.init_lora_weights))
        if before is not None:
            before(model, config, batches)
        made = get_peft_model(model, config)
        if config.init_lora_weights == "eva":
            _start_eva(made, batches)
        refuse_empty_rows(made)
        made.first_factors = first_factors(made) if rewrites_the_base(config.init_lora_weights) else {}
        return made

    def collate(self, rows: Sequence[Encoded], pad: int) -> dict[str, Tensor]:
        return self._peft.collate(rows, pad)

    def state(self, model: Any) -> dict[str, Tensor]:
        return self._peft.state(model)

    def before_step(self, model: Any) -> None:
        """Nothing is added to the gradients."""

    def after_step(self, model: Any, optimizer: Any, step: int) -> None:
        """Nothing happens between steps."""

    def save(self, model: Any, folder: Path, base_name: str) -> None:
        self._peft.save(model, folder, base_name)
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        config |= {"init_lora_weights": True, **dict.fromkeys(SETTINGS)}
        if model.first_factors:
            tensors = load_file(folder / WEIGHTS_FILE)
            save_file(doubled(tensors, model.first_factors), folder / WEIGHTS_FILE, {"format": "pt"})
            scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
            config |= {"r": 2 * config["r"], "lora_alpha": 2 * config["r"] * scaling, "use_rslora": False}
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def refuse_empty_rows(model: Any) -> None:
    """DoRA divides by the length of every row; that of a token that was never trained may be nothing."""
    for name, value in model.named_parameters():
        if ".lora_magnitude_vector." in name and not bool(value.all()):
            module = name.removeprefix("base_model.model.").partition(".lora_magnitude_vector")[0]
            raise BaseUnfit(f"{module} has rows of zeros, and DoRA divides by their length: leave it out, or dora")


def first_factors(model: Any) -> dict[str, Tensor]:
    """A0 and B0 under the names that they have in a file."""
    return {
        name.replace(".default.", "."): value.detach().clone().cpu()
        for name, value in model.named_parameters()
        if name.endswith(FACTOR)
    }


def doubled(trained: Mapping[str, Tensor], first: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A over A0, B beside -B0; what is saved whole stays as it is."""
    made = {
        name: cat([trained[name], value]) if ".lora_A." in name else cat([trained[name], -value], dim=1)
        for name, value in first.items()
    }
    return {**trained, **made}


def _prepare_corda(model: Any, config: Any, batches: Batches) -> None:
    def run_model() -> None:
        with no_grad():
            for ids in _rows(batches):  # PEFT counts one row at a time, and would count padding
                model(input_ids=ids[None])

    preprocess_corda(model, config, run_model=run_model)


def _prepare_lora_ga(model: Any, config: Any, batches: Batches) -> None:
    def train_step() -> None:
        for batch in batches():
            model(**batch).loss.backward()

    preprocess_loraga(model, config, train_step)
    for parameter in model.parameters():
        parameter.grad = None


def _start_eva(model: Any, batches: Batches) -> None:
    from peft import initialize_lora_eva_weights

    initialize_lora_eva_weights(model, list(batches()), show_progress_bar=False)


def _rows(batches: Batches) -> Iterator[Tensor]:
    for batch in batches():
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            yield ids[mask.bool()]


BEFORE: Final[Mapping[str, Callable[[Any, Any, Batches], None]]] = {
    "corda": _prepare_corda, "lora_ga": _prepare_lora_ga,
}  # fmt: skip
