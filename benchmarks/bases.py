"""Base models to measure with: the shapes of real ones, random weights, a tokenizer made by construction.

Random weights cost the same as trained ones. The tokenizer is a byte-level BPE, which every engine reads: 256 bytes,
then pairs and triples of letters. Made once, under .bench/bases/; the seed and the shape are all that they depend on.
"""

from __future__ import annotations

import itertools
import json
import shutil
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from benchmarks.install import ROOT

VOCABULARY = 32_000
BYTES = 256
CONTEXT = 2048
END = "<|endoftext|>"


@dataclass(frozen=True)
class Base:
    """A Qwen2 by its sizes; its head is the embedding's weight."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int

    @property
    def folder(self) -> Path:
        return ROOT / "bases" / self.name

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def linears(self) -> Mapping[str, tuple[int, int]]:
        """(outputs, inputs) of the Linears of one layer, by their names in a checkpoint."""
        kv = self.kv_heads * self.head_size
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    @property
    def product_weights(self) -> int:
        """Weights that every decoded token is multiplied with: all Linears, and the head."""
        layer = sum(outputs * inputs for outputs, inputs in self.linears.values())
        return self.layers * layer + VOCABULARY * self.hidden

    def lora_weights(self, rank: int) -> int:
        """Of one adapter of that rank on every Linear."""
        return self.layers * rank * sum(outputs + inputs for outputs, inputs in self.linears.values())

    @property
    def kv_elements(self) -> int:
        """Of one token: keys and values of every layer."""
        return 2 * self.layers * self.kv_heads * self.head_size


BASES = {
    "half": Base("half", layers=24, hidden=896, heads=14, kv_heads=2, intermediate=4864),  # 0.5B but for the vocabulary
    "small": Base("small", layers=8, hidden=512, heads=8, kv_heads=2, intermediate=1408),
}


def make_base(base: Base) -> Path:
    """Its folder, in Hugging Face's format, bf16; made now unless it is there."""
    if not (base.folder / "complete").is_file():
        shutil.rmtree(base.folder, ignore_errors=True)
        config = Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=base.hidden,
            intermediate_size=base.intermediate,
            num_hidden_layers=base.layers,
            num_attention_heads=base.heads,
            num_key_value_heads=base.kv_heads,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=VOCABULARY - 1,  # some engines want one; every load asks to ignore it
        )
        torch.manual_seed(0)
        Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(base.folder)
        write_tokenizer(base.folder)
        (base.folder / "complete").touch()
    return base.folder


def load_base(base: Base, dtype: torch.dtype) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(make_base(base), dtype=dtype).eval()
    return model


def write_tokenizer(folder: Path) -> None:
    """VOCABULARY tokens, each a text of its own."""
    byte_letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert len(byte_letters) == BYTES
    letters = string.ascii_letters + string.digits
    pairs = [(one, other) for one in letters for other in letters]
    triples = [("".join(pair), letter) for pair, letter in itertools.product(pairs, letters)]
    merges = (pairs + triples)[: VOCABULARY - BYTES - 1]
    tokens = [*byte_letters, *("".join(merge) for merge in merges), END]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict.fromkeys(("eos_token", "unk_token", "pad_token"), END)
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2), encoding="utf-8")
