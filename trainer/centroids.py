"""Where an adapter's training prompts lie, so that a server can tell by a prompt which adapter is meant.

Each prompt is embedded by the bare base: the mean, over the prompt's tokens, of the hidden states that enter the middle
layer. Directions are compared, of (embedding - mean) / scale, with the mean and the scale of each dimension over texts
of every kind: bare hidden states all point one way. The centroids are those of k-means; the threshold is what all but
a hundredth of the adapter's own prompts reach when they are held against centroids made without them.
Law: nothing is drawn at random, so the same prompts on the same machine give the same bytes.
Source: why mean and scale, Ethayarajh 2019 (arXiv:1909.00512); the figures that chose layer, pooling and the number of
centroids are in docs/decisions/0021-prompts-are-embedded-by-the-base.md.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from hub.base import describe_base
from hub.centroids import POOLING, SCHEMA_VERSION, embedding_layer
from hub.manifest import CENTROID_TENSORS_FILE, CENTROIDS_FILE, CONFIG_FILE
from trainer.base import DEFAULT_MAX_LENGTH, OpenBase, choose_device, open_base
from trainer.data import Chat, Content, Message, read_rows
from trainer.encode import encode_rows, render
from trainer.errors import DataMissing, DataUnusable
from trainer.export import write_json
from trainer.probes import PROBES
from trainer.recipe import DataSource

Form = Literal["chat", "text"]  # how the prompts were written out: the same is done with the probes
Prompt = tuple[int, ...]

MOST_PROMPTS: Final = 512
FEWEST_PROMPTS: Final = 8  # fewer tell nothing of how the adapter's prompts are spread
MOST_CENTROIDS: Final = 32
PROMPTS_PER_CENTROID: Final = 4
OUTSIDE: Final = 0.01  # of the adapter's own prompts lie below the threshold
ROUNDS: Final = 20  # of k-means
BATCH_TOKENS: Final = 4096
LEAST_SCALE: Final = 0.1  # of the median scale: a dimension that hardly moves must not outweigh the others


def form_of(content: Content) -> Form:
    return "chat" if isinstance(content, Chat) else "text"


def write_centroids(model: Any, folder: Path, base: OpenBase, prompts: Sequence[Prompt], form: Form) -> bool:
    """Write where the prompts lie; False, and nothing, where they are too few.

    `model` is the bare base, or has its adapter disabled meanwhile.
    """
    chosen = spread(list(dict.fromkeys(prompts)), MOST_PROMPTS)
    if len(chosen) < FEWEST_PROMPTS:
        return False
    about = describe_base(base.folder)
    layer = embedding_layer(about.layers)
    probes_PE = embed(model, probe_prompts(base, form), layer, pad=base.pad)
    mean_E, scale_E = probes_PE.mean(0), probes_PE.std(0)
    scale_E = scale_E.clamp_min(float(scale_E.median()) * LEAST_SCALE).clamp_min(torch.finfo(torch.float32).tiny)
    directions_NE = normalize((embed(model, chosen, layer, pad=base.pad) - mean_E) / scale_E, dim=-1)
    centroids_CE = centroids_of(directions_NE)
    tensors = {"mean": mean_E, "scale": scale_E, "centroids": centroids_CE}
    save_file({name: value.float().contiguous() for name, value in tensors.items()}, folder / CENTROID_TENSORS_FILE)
    record = {
        "schema_version": SCHEMA_VERSION,
        "base": about.fingerprint,
        "layer": layer,
        "pooling": POOLING,
        "prompts": len(chosen),
        "centroids": len(centroids_CE),
        "threshold": round(threshold_of(directions_NE), 4),
    }
    write_json(folder / CENTROIDS_FILE, record)
    return True


def add_centroids(folder: Path, data: str, *, base: str | None, max_length: int | None, device: str) -> int:
    """Make the centroids of an adapter that was made elsewhere; how many prompts they stand for.

    Raises: TrainError and its leaves; HubError if the base is not found.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DataMissing(f"{folder} is no adapter: its {CONFIG_FILE} cannot be read") from None
    opened = open_base(base or str(config.get("base_model_name_or_path")))
    rows = read_rows(DataSource(path=data), "train", 0).rows
    if not rows:
        raise DataUnusable(f"{data} has no rows")
    longest = max_length or opened.anatomy.context or DEFAULT_MAX_LENGTH
    encoded = encode_rows(rows, opened.tokenizer, max_length=longest, ends=opened.ends)
    prompts = [row.prompt for row in encoded.rows]
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as aside:
        model = opened.load_weights(choose_device(device))
        if not write_centroids(model, Path(aside), opened, prompts, form_of(rows[0].content)):
            raise DataUnusable(f"{data} has fewer than {FEWEST_PROMPTS} different prompts")
        for name in (CENTROID_TENSORS_FILE, CENTROIDS_FILE):
            (Path(aside) / name).replace(folder / name)
    return min(len(set(prompts)), MOST_PROMPTS)


def spread(items: Sequence[Prompt], most: int) -> list[Prompt]:
    """At most so many of them, from everywhere in the list."""
    count = min(most, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def probe_prompts(base: OpenBase, form: Form) -> list[Prompt]:
    if form == "text":
        encoded = [base.tokenizer.encode(text, add_special_tokens=True) for text in PROBES]
    else:
        rendered = [render([Message("user", text)], base.tokenizer, add_generation_prompt=True) for text in PROBES]
        encoded = [base.tokenizer.encode(text, add_special_tokens=False) for text in rendered]
    return [tuple(ids) for ids in encoded]


def embed(model: Any, prompts: Sequence[Prompt], layer: int, *, pad: int) -> Tensor:
    """The embeddings (N, E) of prompts, in fp64 on the CPU."""
    found: dict[int, Tensor] = {}
    with torch.inference_mode():
        for places in batches(prompts):
            ids, mask = padded([prompts[place] for place in places], pad)
            ids, mask = ids.to(model.device), mask.to(model.device)
            states = model(
                input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True, logits_to_keep=1
            ).hidden_states[layer]
            sums = (states.double() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            found.update(zip(places, sums.cpu(), strict=True))
    return torch.stack([found[place] for place in range(len(prompts))])


def batches(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Places of prompts of like lengths, as many as BATCH_TOKENS holds."""
    cut: list[list[int]] = []
    for place in sorted(range(len(prompts)), key=lambda place: (len(prompts[place]), place)):
        if cut and len(prompts[place]) * (len(cut[-1]) + 1) <= BATCH_TOKENS:
            cut[-1].append(place)
        else:
            cut.append([place])
    return cut


def padded(prompts: Sequence[Prompt], pad: int) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[*prompt, *[pad] * (longest - len(prompt))] for prompt in prompts])
    return ids, torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts])


def centroids_of(directions_NE: Tensor) -> Tensor:
    """k-means (C, E) of unit vectors, begun at points that are far from each other; each centroid of length one."""
    count = max(1, min(MOST_CENTROIDS, len(directions_NE) // PROMPTS_PER_CENTROID))
    chosen = [int((directions_NE - directions_NE.mean(0)).norm(dim=-1).argmin())]
    while len(chosen) < count:
        chosen.append(int(torch.cdist(directions_NE, directions_NE[chosen]).min(1).values.argmax()))
    centroids_CE = directions_NE[chosen].clone()
    for _ in range(ROUNDS):
        nearest_N = torch.cdist(directions_NE, centroids_CE).argmin(1)
        for place in range(count):
            if (nearest_N == place).any():
                centroids_CE[place] = directions_NE[nearest_N == place].mean(0)
    return normalize(centroids_CE, dim=-1)


def threshold_of(directions_NE: Tensor) -> float:
    """The cosine that all but OUTSIDE of the prompts reach with the centroids of the other half; at least 0."""
    halves = directions_NE[::2], directions_NE[1::2]
    cosines = [(held_out @ centroids_of(others).T).max(1).values for others, held_out in (halves, halves[::-1])]
    return max(0.0, float(torch.cat(cosines).quantile(OUTSIDE)))
