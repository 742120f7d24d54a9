"""Experts that were trained with a router become adapters of their own, and the router pins what they have become.

They lie in the router's folder with config and weights. Each gets golden rows, its scores and its origin, after which
nothing of it changes; its digest, by the hub's rule, then takes the place of the one that it was trained from.
They get no centroids, so that `model: auto` does not choose what is a part of a router.
Law: the router's pins are the digests that a push of these folders gives.
"""

from __future__ import annotations

import json
from typing import Final

from hub.companions import expert_folder, folder_digest
from hub.manifest import CONFIG_FILE, METRICS_FILE, README_FILE, RECIPE_FILE
from trainer import export
from trainer.card import expert_card
from trainer.evaluate import evaluate

RECORD: Final = "lora-moe-expert"


def complete(finishing: export.Finishing) -> None:
    """Does nothing where experts are frozen."""
    names = finishing.recipe["options"]["expert_names"] or ()
    origins = finishing.recipe["options"]["experts"]
    pins = []
    for name, origin in zip(names, origins, strict=bool(names)):
        complete_one(finishing, name, origin)
        pins.append(f"{name}@{folder_digest(expert_folder(finishing.folder, name))}")
    if pins:
        path = finishing.folder / CONFIG_FILE
        config = {**json.loads(path.read_text(encoding="utf-8")), "experts": pins}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def complete_one(finishing: export.Finishing, name: str, origin: str) -> None:
    """What stands beside the weights. The expert is measured alone, on rows of all skills."""
    folder, base = expert_folder(finishing.folder, name), finishing.base
    loaded = export.load_adapter(folder, base, finishing.device)
    vocabulary = loaded.config.get_text_config().vocab_size
    score = evaluate(loaded, finishing.held_out, pad=base.pad, vocabulary=vocabulary)
    export.write_golden(loaded, folder, base, export.golden_prompts(finishing.held_out))
    recipe = {
        "schema_version": export.SCHEMA_VERSION,
        "method": RECORD,
        "base": finishing.recipe["base"],
        "name": name,
        "parents": [origin.partition("@")[2]],
        "data": finishing.recipe["data"],
        "router": finishing.recipe,
    }
    metrics = {
        "schema_version": export.SCHEMA_VERSION,
        "eval_loss": score.loss,
        "eval_exact_match": score.exact_match,
        "eval_rows": score.rows,
    }
    export.write_json(folder / RECIPE_FILE, recipe)
    export.write_json(folder / METRICS_FILE, metrics)
    (folder / README_FILE).write_text(expert_card(recipe, metrics, origin), encoding="utf-8")
