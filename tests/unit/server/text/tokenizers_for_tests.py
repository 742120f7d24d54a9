"""Small real tokenizers of the three families, made on the spot: byte-level BPE, BPE with byte fallback, WordPiece."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = (
    "You are a helpful gardener. Graft the apple onto the quince in spring, before the buds open.",
    "Hello there! Which rootstock suits a small garden? Let me count: one, two, three, 42.",
    "接ぎ木 は 楽しい。 Żółw je jabłko. Der Apfel fällt nicht weit vom Stamm. 🌱🍏",
    '{"json": [1, 2.5, null], "path": "a/b\\n"}  def graft(x):\n\treturn x + 1\n',
)
CONTROL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
CHATML = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' and loop.previtem is defined and loop.previtem['role'] == 'user' %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if shout %}{{ '!' }}{% endif %}{% endif %}"
)


@cache
def byte_level(*, chat: bool = True) -> Any:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    core.add_tokens([AddedToken("<tool call>", special=False)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    if chat:
        wrapped.chat_template = CHATML
    return wrapped


@cache
def byte_fallback() -> Any:
    """As Llama's: spaces are ▁, unknown characters fall into <0x..> tokens, decoding trims the first space."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False)
    core.train_from_iterator((text for text in CORPUS if text.isascii()), trainer)
    # The byte tokens of a real model are ordinary entries of its vocabulary, not special ones.
    vocabulary = core.get_vocab()
    merges = [tuple(merge) for merge in json.loads(core.to_str())["model"]["merges"]]
    core.model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    plain = Tokenizer(core.model)
    plain.normalizer, plain.decoder = core.normalizer, core.decoder
    plain.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


@cache
def word_piece() -> Any:
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="[SEP]", unk_token="[UNK]")
