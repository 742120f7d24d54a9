"""What a config of any family may ask for beside its own tensors: whole modules, and rows of the vocabulary.

`modules_to_save` are saved whole, as the base saves them: Linear layers, the output head, the embedding and norms are
served so. `trainable_token_indices` are rows of the embedding, or of the head, which go together where the two are
tied. PEFT also writes the base's own embedding and head beside an adapter of them, or when it is told to; such a copy
may be there, and the server demands that it equals the base's.
Source: peft 0.21.2, utils/other.py `_set_trainable`, `set_additional_trainable_modules`; utils/save_and_load.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hub.base import HEAD, Base, Embedding, Modules, conv1d_layers
from hub.families.method import TENSOR_PREFIX, Complaint, Config, Layout, Shapes
from hub.ref import printable

ROWS = "token_adapter.trainable_tokens_delta"
SAVED, TOKENS = "modules_to_save", "trainable_token_indices"


def with_whole(config: Config, base: Base, modules: Modules, *, layout: Layout) -> Layout:
    """A family's layout and what all families share. The layout's own tensors say which modules it changes."""
    changed = {name.removeprefix(TENSOR_PREFIX) for name in (*layout.shapes, *layout.optional)}
    saved = _saved(config, modules)
    shapes: dict[str, tuple[int, ...]] = {}
    optional: dict[str, tuple[int, ...]] = {}
    complaints = [*_unfit(config, modules), *_saved_twice(saved, changed)]
    for module in saved:
        shapes[f"{TENSOR_PREFIX}{module}.weight"], bias = _parts(module, base, modules)
        if modules.biased is None or module in modules.biased:
            (optional if modules.biased is None else shapes)[f"{TENSOR_PREFIX}{module}.bias"] = bias
    if config.get(TOKENS):
        rows, misfits = _rows(config[TOKENS], modules, changed=changed | {f"{module}.weight" for module in saved})
        shapes |= rows
        complaints += misfits
    optional |= _copies(config, modules, changed=changed)
    return replace(
        layout,
        shapes={**layout.shapes, **shapes},
        complaints=(*layout.complaints, *complaints),
        optional={**{name: shape for name, shape in optional.items() if name not in shapes}, **layout.optional},
    )


def index_complaints(indices: list[int], rows: int, *, key: str) -> list[Complaint]:
    """What is wrong with tokens whose rows are replaced."""
    strange = next((index for index in indices if index >= rows), None)
    if strange is not None:
        return [(key, f"token {strange} is not in the base's vocabulary of {rows}, which is not resized")]
    return [(key, "names a token twice")] if len(set(indices)) < len(indices) else []


def head_complaints(modules: Modules, *, key: str) -> list[Complaint]:
    """A head with a bias cannot have rows replaced."""
    if modules.biased is None or HEAD not in modules.biased:
        return []
    return [(key, f"{HEAD} has a bias, which PEFT drops where it replaces rows: that is not served")]


def _saved(config: Config, modules: Modules) -> tuple[str, ...]:
    """PEFT compares ends here without a dot between, and so do we."""
    wanted = tuple(config.get(SAVED) or ())
    table = [modules.embedding.name] if modules.embedding is not None else []
    known = [*modules.linears, *modules.norms, *table]
    return tuple(module for module in known if wanted and module.endswith(wanted))


def _unfit(config: Config, modules: Modules) -> list[Complaint]:
    wanted = tuple(config.get(SAVED) or ())
    if not wanted:
        return []
    served = _saved(config, modules)
    leaves = {*modules.linears, *modules.others}
    inside = {module[:end] for module in leaves for end, letter in enumerate(module) if letter == "."}
    strange = sorted(name for name in {*modules.others, *inside} - {*served} if name.endswith(wanted))
    if strange:
        return [(SAVED, f"replaces {printable(strange[0])}, which is no Linear layer, norm or embedding of the base")]
    missing = [name for name in wanted if not any(module.endswith(name) for module in served)]
    return [(SAVED, f"{printable(missing[0])} is not in the base")] if missing else []


def _saved_twice(saved: tuple[str, ...], changed: set[str]) -> list[Complaint]:
    twice = [module for module in saved if any(name.startswith(f"{module}.") for name in changed)]
    return [(SAVED, f"{printable(twice[0])} is adapted, or its bias is trained, too")] if twice else []


def _parts(module: str, base: Base, modules: Modules) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of its weight and of a bias."""
    if module in modules.norms:
        return (modules.norms[module],), (modules.norms[module],)
    if modules.embedding is not None and module == modules.embedding.name:
        return (modules.embedding.rows, modules.embedding.features), ()
    linear = modules.linears[module]
    transposed = module.rpartition(".")[2] in conv1d_layers(base.model_type)
    return (linear.inputs, linear.outputs) if transposed else (linear.outputs, linear.inputs), (linear.outputs,)


def _rows(asked: Any, modules: Modules, *, changed: set[str]) -> tuple[Shapes, list[Complaint]]:
    table = modules.embedding
    if table is None:
        return {}, [(TOKENS, "replaces rows of the embedding, of which the base's description tells nothing")]
    given: dict[str, list[int]] = {}
    complaints: list[Complaint] = []
    for name, indices in (asked if isinstance(asked, Mapping) else {table.name: asked}).items():
        module = next((one for one in (table.name, HEAD) if one == name or one.endswith(f".{name}")), None)
        if module is None or module in given:
            return {}, [(TOKENS, f"{printable(name)} is no embedding or output head of its own in the base")]
        given[module] = indices
        complaints += index_complaints(indices, table.rows, key=TOKENS)
    if table.tied and given.get(HEAD) == given.get(table.name):
        del given[HEAD]  # PEFT keeps one set of rows for both
    touched = {*given, *([HEAD] if table.tied and table.name in given else [])}
    if HEAD in touched:
        complaints += head_complaints(modules, key=TOKENS)
    twice = [module for module in touched if any(name.startswith(f"{module}.") for name in changed)]
    complaints += [(TOKENS, f"{printable(module)} is adapted or replaced, too") for module in sorted(twice)]
    return {f"{TENSOR_PREFIX}{name}.{ROWS}": (len(rows), table.features) for name, rows in given.items()}, complaints


def _copies(config: Config, modules: Modules, *, changed: set[str]) -> Shapes:
    """Where the base's own embedding and head may stand: wrapped where they are adapted, plain where they are not."""
    found: dict[str, tuple[int, ...]] = {}
    for module, shape in _tables(modules.embedding, modules).items():
        adapted = any(name.startswith(f"{module}.") for name in changed)
        inner = "base_layer." if adapted else ""
        found[f"{TENSOR_PREFIX}{module}.{inner}weight"] = shape
        if adapted and module == HEAD and config.get("bias", "none") == "none":
            found[f"{TENSOR_PREFIX}{module}.{inner}bias"] = shape[:1]
    return found


def _tables(table: Embedding | None, modules: Modules) -> dict[str, tuple[int, ...]]:
    head = modules.linears.get(HEAD)
    found: dict[str, tuple[int, ...]] = {} if table is None else {table.name: (table.rows, table.features)}
    return found if head is None else {**found, HEAD: (head.outputs, head.inputs)}
