"""Finding and describing base models."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hub.base import Linear, describe_base, find_base, find_local_base, modules, name_of
from hub.errors import BaseNotFound, BaseUnusable
from tests.unit.hub.makers import HIDDEN, INNER, VOCAB, base_tensors, write_base


def test_a_base_is_described_by_its_shapes_and_tokenizer(base: Path) -> None:
    described = describe_base(base, name="tiny")
    assert described.model_dump(exclude={"tokenizer", "fingerprint"}) == {
        "name": "tiny", "revision": None, "model_type": "llama", "hidden_size": 32, "layers": 2, "heads": 4,
        "kv_heads": 2, "head_dim": 8, "intermediate_size": 48, "vocab_size": 64, "experts": None,
    }  # fmt: skip
    assert described.kv_width == 16


def test_the_fingerprint_follows_shapes_and_tokenizer_but_not_the_name(base: Path, tmp_path: Path) -> None:
    other = write_base(tmp_path / "other")
    assert describe_base(base, name="a").fingerprint == describe_base(other, name="b").fingerprint
    (other / "tokenizer.json").write_text("{}")
    assert describe_base(base).fingerprint != describe_base(other).fingerprint
    bigger = write_base(tmp_path / "bigger", vocab_size=VOCAB + 1)
    assert describe_base(base).fingerprint != describe_base(bigger).fingerprint


def test_a_config_that_contradicts_the_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseUnusable, match=r"k_proj 32 outputs .*has 16"):
        describe_base(write_base(tmp_path / "wrong", num_key_value_heads=4))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_size": None}, "no hidden_size"),
        ({"vocab_size": "64"}, "vocab_size is 64, not a whole number"),
        ({"num_hidden_layers": -2}, "num_hidden_layers is -2"),
        ({"model_type": None}, "no model_type"),
    ],
)
def test_a_config_without_a_size_is_refused_by_the_name_of_the_field(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    with pytest.raises(BaseUnusable, match=reason):
        describe_base(write_base(tmp_path / "base", **changes))


def test_linear_layers_are_told_from_embeddings_and_norms(base: Path) -> None:
    found = modules(base)
    assert found.linears["model.layers.1.mlp.down_proj"] == Linear(INNER, HIDDEN)
    assert found.linears["lm_head"] == Linear(HIDDEN, VOCAB)
    assert len(found.linears) == 2 * 7 + 1
    assert {"model.embed_tokens", "model.norm", "model.layers.0.input_layernorm"} <= found.others


def test_a_tied_head_is_there_though_no_file_stores_it(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "tied")
    tensors = base_tensors()
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    assert modules(folder).linears["lm_head"] == Linear(HIDDEN, VOCAB)


def test_gpt2_has_its_weights_the_other_way_round_and_may_lack_its_prefix(tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    folder.mkdir()
    config = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 10}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {
        "h.0.attn.c_attn.weight": np.zeros((8, 24), np.float32),
        "h.0.mlp.c_fc.weight": np.zeros((8, 32), np.float32),
        "h.0.attn.bias": np.zeros((1, 1, 4, 4), np.float32),
        "wte.weight": np.zeros((10, 8), np.float32),
    }
    save_file(tensors, folder / "model.safetensors")
    assert modules(folder).linears == {
        "transformer.h.0.attn.c_attn": Linear(8, 24),
        "transformer.h.0.mlp.c_fc": Linear(8, 32),
        "lm_head": Linear(8, 10),
    }
    described = describe_base(folder)
    assert (described.heads, described.kv_heads, described.head_dim, described.intermediate_size) == (2, 2, 4, 32)


def test_sharded_weights_are_read_shard_by_shard(base: Path, tmp_path: Path) -> None:
    folder = write_base(tmp_path / "sharded")
    tensors = base_tensors()
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, inside in halves.items():
        save_file({name: tensors[name] for name in inside}, folder / shard)
    index = {"weight_map": {name: shard for shard, inside in halves.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert modules(folder) == modules(base)
    index["weight_map"]["x"] = "../../secret.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BaseUnusable, match="no shard beside it"):
        modules(folder)


def test_a_base_of_pickles_is_refused(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BaseUnusable, match="a pickle is never read"):
        modules(folder)


def test_quantised_weights_are_refused_because_their_shapes_are_gone(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "quantised")
    tensors = base_tensors()
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((512, 1), np.uint8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(BaseUnusable, match="stored quantised"):
        modules(folder)


def test_a_base_is_found_as_a_folder_and_missing_ones_are_told_clearly(base: Path, tmp_path: Path) -> None:
    assert find_base(str(base)) == base
    with pytest.raises(BaseUnusable, match=r"without config\.json"):
        find_base(str(tmp_path))
    for missing in ("nobody/nothing", "/no/such/folder", "../../etc", ""):
        with pytest.raises((BaseNotFound, BaseUnusable)):
            find_local_base(missing)


def test_a_record_never_holds_a_whole_path_of_this_machine(base: Path, tmp_path: Path) -> None:
    assert name_of(base) == "tiny-llama"
    assert name_of(base, "org/model") == "org/model"
    assert name_of(base, "/home/me/models/mine/") == "mine"
    cached = tmp_path / "models--org--model" / "snapshots" / ("0" * 40)
    write_base(cached)
    assert name_of(cached, "/somewhere") == "org/model"
    assert describe_base(cached).revision == "0" * 40
