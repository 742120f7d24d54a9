"""What a base model is to an adapter: its shapes and its tokenizer, read from a folder without loading a weight.

A base is found by the name of an embedded one, as a local folder, or by its id in the Hugging Face cache or hub.
Never imports torch, never reads a pickle.
Law: the fingerprint depends on the shapes and the tokenizer only, not on where the folder lies or what it is called.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, computed_field

from hub.digest import sha256_of, sha256_of_stream
from hub.errors import BadTensors, BaseNotFound, BaseUnusable
from hub.experts import Parameter, experts_of
from hub.ref import SLUG, printable
from hub.strict_json import BadJson, canonical, parse
from hub.tensors import TensorEntry, read_header

MAX_CONFIG_BYTES = 4 << 20
MAX_INDEX_BYTES = 64 << 20
# The format's own limit: a base has many more tensors than an adapter.
MAX_BASE_HEADER_BYTES = 100_000_000

EMBEDDED = Path(__file__).parent / "bases"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_FETCHED = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
_HUGGING_FACE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_SNAPSHOT = re.compile(r"[0-9a-f]{40}")
_EMBEDDINGS = frozenset(
    {"embed_tokens", "wte", "wpe", "embed_positions", "position_embeddings", "word_embeddings", "embed_in"}
)
_TABLES = ("embed_tokens", "wte", "word_embeddings", "embed_in")  # the last part of the name of a table of tokens
HEAD = "lm_head"
_QUANTISED_DTYPES = frozenset({"U8", "I32"})

# GPT-2 stores Linear layers as Conv1D: the weight is (in, out), and checkpoints may lack the prefix.
_CONV1D_LAYERS = {"gpt2": frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})}
_PREFIX = {"gpt2": "transformer.", "gpt_neox": "gpt_neox."}
# What transformers 5.23 renames as it loads a checkpoint.
_RENAMED = {"gpt_neox": ("embed_out.", "lm_head."), "mixtral": (".block_sparse_moe.", ".mlp.")}
# Sizes that a config.json may leave out, with the defaults of transformers 5.23.
_KV_HEADS = {
    "mistral": 8, "qwen2": 32, "qwen3": 32, "gemma": 16, "gemma2": 4, "gemma3_text": 4, "smollm3": 4,
    "starcoder2": 2, "mixtral": 8, "qwen3_moe": 4, "gpt_oss": 8,
}  # fmt: skip
_HEAD_DIM = {"qwen3": 128, "gemma": 256, "gemma2": 256, "gemma3_text": 256, "gpt_oss": 64}
_GPT2_NAMES = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
}  # fmt: skip


class Base(BaseModel):
    """The shapes of a base model, its tokenizer, and the fingerprint over both."""

    model_config = ConfigDict(frozen=True, defer_build=True, extra="ignore")

    name: str
    revision: str | None = None
    model_type: str
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int | None
    vocab_size: int
    tokenizer: str | None
    experts: int | None = None  # of each layer of a mixture of experts

    @computed_field  # type: ignore[prop-decorator]
    @property
    def fingerprint(self) -> str:
        """sha256 over everything but the name and the revision; experts count where there are any."""
        left_out = {"name", "revision", "fingerprint"} | ({"experts"} if self.experts is None else set())
        return sha256_of(canonical(self.model_dump(exclude=left_out)))

    @property
    def kv_width(self) -> int:
        """The width of one layer's keys: what a prefix is made of."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class Linear:
    """The sizes of one Linear (or Conv1D) layer."""

    inputs: int
    outputs: int


@dataclass(frozen=True, slots=True)
class Embedding:
    """The table of tokens: its name and sizes, and whether the output head's weight is the same table."""

    name: str
    rows: int
    features: int
    tied: bool


@dataclass(frozen=True, slots=True)
class Modules:
    """Every module of a base that has a weight, by the name that PEFT matches: Linear layers, and all others.

    Among the others are the norms, with their sizes, and the embedding.
    `parameters` are the weights of routers and experts, which are among the others, by their full names.
    """

    linears: Mapping[str, Linear]
    others: frozenset[str]
    biased: frozenset[str] | None = None  # those with a bias; None where the description does not tell
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    norms: Mapping[str, int] = field(default_factory=dict)
    embedding: Embedding | None = None


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a base: its file, its name there, and what it is."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def embedded_bases() -> tuple[str, ...]:
    """The names of the bases that ship with the package."""
    if not EMBEDDED.is_dir():
        return ()
    return tuple(sorted(path.name for path in EMBEDDED.iterdir() if (path / "config.json").is_file()))


def find_base(name_or_path: str) -> Path:
    """The folder of a base model, fetched from the Hugging Face hub when it is not here yet.

    Raises: BaseNotFound, BaseUnusable.
    """
    try:
        return find_local_base(name_or_path)
    except BaseNotFound:
        if not _HUGGING_FACE_ID.fullmatch(name_or_path):
            raise
        return _fetch(name_or_path)


def find_local_base(name_or_path: str) -> Path:
    """As `find_base`, but nothing is fetched: a name from a stranger's file must not start a download.

    Raises: BaseNotFound, BaseUnusable.
    """
    if re.fullmatch(SLUG, name_or_path) and (EMBEDDED / name_or_path / "config.json").is_file():
        return EMBEDDED / name_or_path
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise BaseUnusable(f"base {printable(name_or_path)} is a folder without config.json")
        return folder
    if _HUGGING_FACE_ID.fullmatch(name_or_path) and (cached := _cached(name_or_path)) is not None:
        return cached
    raise BaseNotFound(
        f"base {printable(name_or_path)} is no embedded base, no folder here, and not in the Hugging Face cache"
        f"{_embedded_hint()}"
    )


def describe_base(folder: Path, *, name: str | None = None) -> Base:
    """Raises: BaseUnusable when config.json lacks a size or contradicts the weights."""
    config = _config(folder)
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise BaseUnusable(f"{_shown(folder)}: config.json names no model_type")
    hidden, layers, heads = (
        _size(config, key, folder) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )
    head_dim = _optional(config, "head_dim", folder) or _HEAD_DIM.get(model_type) or hidden // heads
    inner = _optional(config, "intermediate_size", folder)
    all_modules = modules(folder)
    base = Base(
        name=name if name is not None else name_of(folder),
        revision=folder.name if folder.parent.name == "snapshots" and _SNAPSHOT.fullmatch(folder.name) else None,
        model_type=model_type,
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=_kv_heads(config, model_type, heads, folder),
        head_dim=head_dim,
        intermediate_size=4 * hidden if inner is None and model_type == "gpt2" else inner,
        vocab_size=_size(config, "vocab_size", folder),
        tokenizer=_tokenizer(folder),
        experts=max((found.experts for found in all_modules.parameters.values()), default=None),
    )
    check_against_weights(base, all_modules)
    return base


def name_of(folder: Path, declared: str | None = None) -> str:
    """What to call a base in a record: an id or a last path component, never a whole path of this machine."""
    if folder.resolve().parent == EMBEDDED.resolve():
        return folder.name
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    if declared and _HUGGING_FACE_ID.fullmatch(declared):
        return declared
    return (declared or str(folder.resolve())).rstrip("/").rpartition("/")[2]


def modules(folder: Path) -> Modules:
    """The modules of the base under the names that they have in the loaded causal LM.

    Raises: BaseUnusable, also for weights that are stored quantised, because their shapes are gone; but for GPTQ's and
    AWQ's in 4 bits.
    """
    config = _config(folder)
    model_type = str(config.get("model_type"))
    tensors = {_loaded_name(entry.name, model_type): entry for entry in _entries(folder)}
    mixture = experts_of(model_type, tensors, shown=_shown(folder))
    linears: dict[str, Linear] = {}
    others = set(mixture.modules)
    biased = set(mixture.biased)
    for name, entry in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "qweight":
            linears[module] = _coded_linear(entry.shape, config, shown=_shown(folder))
        if part == "bias" and len(entry.shape) == 1:  # GPT-2 calls its mask a bias, too
            biased.add(module)
        if part != "weight" or name in mixture.taken:
            continue
        leaf = module.rpartition(".")[2]
        if len(entry.shape) != 2 or leaf in _EMBEDDINGS:
            others.add(module)
            continue
        if entry.dtype in _QUANTISED_DTYPES:
            raise BaseUnusable(f"{_shown(folder)}: {module} is stored quantised ({entry.dtype}); name the full base")
        linears[module] = _linear(entry.shape, conv1d=leaf in conv1d_layers(model_type))
    tied = config.get("tie_word_embeddings")
    tied = tied if isinstance(tied, bool) else HEAD not in linears
    if HEAD not in linears:  # tied to the embedding, so not stored again
        linears[HEAD] = Linear(_size(config, "hidden_size", folder), _size(config, "vocab_size", folder))
    weights = {name.removesuffix(".weight"): tensors[name].shape for name in tensors if name.endswith(".weight")}
    return Modules(
        linears,
        frozenset(others),
        frozenset(biased),
        mixture.parameters,
        {name: shape[0] for name, shape in weights.items() if name in others and len(shape) == 1},
        _embedding(weights, others, tied=tied),
    )


def _coded_linear(shape: tuple[int, ...], config: Mapping[str, Any], *, shown: str) -> Linear:
    """8 codes stand in 32 bits: inputs for GPTQ, outputs for AWQ."""
    told = config.get("quantization_config")
    method, bits = (told.get("quant_method"), told.get("bits")) if isinstance(told, Mapping) else (None, None)
    if method not in ("gptq", "awq") or bits != 4 or len(shape) != 2:
        raise BaseUnusable(f"{shown}: stored quantised by {method} with bits {bits}; name the full base")
    return Linear(shape[0] * 8, shape[1]) if method == "gptq" else Linear(shape[0], shape[1] * 8)


def _embedding(weights: Mapping[str, tuple[int, ...]], others: Set[str], *, tied: bool) -> Embedding | None:
    tables = [name for name in weights if name in others and name.rpartition(".")[2] in _TABLES]
    if len(tables) != 1:
        return None
    rows, features = weights[tables[0]]
    return Embedding(tables[0], rows, features, tied)


def stored_tensors(folder: Path) -> Mapping[str, StoredTensor]:
    """Where each tensor of a base lies, by the name that it has in the loaded causal LM. Raises: BaseUnusable."""
    model_type = str(_config(folder).get("model_type"))
    return {
        _loaded_name(entry.name, model_type): StoredTensor(path, entry.name, entry.shape, entry.dtype)
        for path in _weight_files(folder)
        for entry in _header(path, folder)
    }


def conv1d_layers(model_type: str) -> frozenset[str]:
    """The last parts of the names of Linear layers that a network of this type stores as Conv1D."""
    return _CONV1D_LAYERS.get(model_type, frozenset())


def _loaded_name(stored: str, model_type: str) -> str:
    """A tensor's name in the loaded causal LM: checkpoints of the network without its head lack the prefix."""
    stored = stored.replace(*_RENAMED[model_type]) if model_type in _RENAMED else stored
    prefix = _PREFIX.get(model_type, "model.")
    return stored if stored.startswith((prefix, "lm_head.")) else prefix + stored


def _linear(shape: tuple[int, ...], *, conv1d: bool) -> Linear:
    rows, columns = shape
    return Linear(rows, columns) if conv1d else Linear(columns, rows)


def _entries(folder: Path) -> list[TensorEntry]:
    return [entry for path in _weight_files(folder) for entry in _header(path, folder)]


def _header(path: Path, folder: Path) -> tuple[TensorEntry, ...]:
    try:
        with path.open("rb") as source:
            size = path.stat().st_size
            return read_header(source, size, max_header_bytes=MAX_BASE_HEADER_BYTES).entries
    except BadTensors as error:
        raise BaseUnusable(f"{_shown(folder)}: {path.name}: {error}") from error
    except OSError as error:
        raise BaseUnusable(f"{_shown(folder)}: {path.name}: {error.strerror}") from error


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise BaseUnusable(f"{_shown(folder)} has neither {WEIGHTS} nor {INDEX}; a pickle is never read")
    index = _read_json(folder, INDEX, MAX_INDEX_BYTES)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BaseUnusable(f"{_shown(folder)}: {INDEX} has no weight_map")
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        if not _SHARD.fullmatch(shard):
            raise BaseUnusable(f"{_shown(folder)}: {INDEX} names {printable(shard)}, which is no shard beside it")
    return [folder / shard for shard in shards]


def _config(folder: Path) -> dict[str, Any]:
    config = _read_json(folder, "config.json", MAX_CONFIG_BYTES)
    text = config.get("text_config")
    if isinstance(text, dict) and "hidden_size" not in config:
        config = {**config, **text}
    if config.get("model_type") == "gpt2":
        config = {**config, **{ours: config.get(theirs) for ours, theirs in _GPT2_NAMES.items()}}
    return config


def _read_json(folder: Path, name: str, limit: int) -> dict[str, Any]:
    try:
        with (folder / name).open("rb") as source:
            data = source.read(limit + 1)
    except OSError as error:
        raise BaseUnusable(f"{_shown(folder)}: {name}: {error.strerror}") from error
    if len(data) > limit:
        raise BaseUnusable(f"{_shown(folder)}: {name} is above the limit of {limit} bytes")
    try:
        value = parse(data)
    except BadJson as error:
        raise BaseUnusable(f"{_shown(folder)}: {name}: {error}") from error
    if not isinstance(value, dict):
        raise BaseUnusable(f"{_shown(folder)}: {name} is no JSON object")
    return value


def _size(config: Mapping[str, Any], key: str, folder: Path) -> int:
    value = _optional(config, key, folder)
    if value is None:
        raise BaseUnusable(f"{_shown(folder)}: config.json has no {key}")
    return value


def _optional(config: Mapping[str, Any], key: str, folder: Path) -> int | None:
    value = config.get(key)
    if value is None or (type(value) is int and value > 0):
        return value
    raise BaseUnusable(f"{_shown(folder)}: config.json: {key} is {printable(str(value))}, not a whole number above 0")


def _kv_heads(config: Mapping[str, Any], model_type: str, heads: int, folder: Path) -> int:
    if "num_key_value_heads" in config:
        return _optional(config, "num_key_value_heads", folder) or heads
    return _KV_HEADS.get(model_type, heads)


def _tokenizer(folder: Path) -> str | None:
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    with path.open("rb") as source:
        return sha256_of_stream(source)


def check_against_weights(base: Base, found: Modules) -> None:
    """The config is what people edit; the weights are what runs. Raises: BaseUnusable."""
    for suffix, wanted in ((".q_proj", base.heads * base.head_dim), (".k_proj", base.kv_width)):
        for name, linear in found.linears.items():
            if name.endswith(suffix) and linear.outputs != wanted:
                raise BaseUnusable(
                    f"base {printable(base.name)}: config.json gives {suffix[1:]} {wanted} outputs "
                    f"(head_dim {base.head_dim}), but {printable(name)} has {linear.outputs}"
                )


def _cached(name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return folder if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file() else None


def _fetch(name: str) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise BaseNotFound(
            f"base {printable(name)} is no embedded base, no folder here, not in the Hugging Face cache, and cannot be "
            f"fetched while HF_HUB_OFFLINE is set{_embedded_hint()}"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=list(_FETCHED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise BaseNotFound(
            f"base {printable(name)} is no embedded base, no folder here, not in the Hugging Face cache, and could not "
            f"be fetched: {reason}{_embedded_hint()}"
        ) from error


def _embedded_hint() -> str:
    names = embedded_bases()
    return f" (embedded bases: {', '.join(names)})" if names else ""


def _shown(folder: Path) -> str:
    """The folder's last part only: an error may travel to a client, which must learn no path of this machine."""
    return f"base {printable(folder.name)}"
