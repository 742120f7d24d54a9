"""Which tokens are learnt: the assistant's, to the end of its turn, and no others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.base import OpenBase, open_base
from trainer.data import Chat, Completion, Message, Row
from trainer.encode import IGNORED, Encoded, encode, encode_rows
from trainer.errors import DataInvalid, DataUnusable, TemplateUnfit

MakeBase = Callable[..., Path]

FORGETFUL = (  # drops every answer but the last: no rendering extends another
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>"
    "{% if loop.last %}{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}{% else %}...<|end|>{% endif %}"
    "{% else %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TWO_TURNS = Chat(
    (
        Message("system", "be brief"),
        Message("user", "one"),
        Message("assistant", "uno"),
        Message("user", "two"),
        Message("assistant", "dos"),
    )
)


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> OpenBase:
    return open_base(str(tiny_base))


def learnt(base: OpenBase, encoded: Encoded) -> str:
    return str(base.tokenizer.decode([label for label in encoded.labels if label != IGNORED]))


def spans(encoded: Encoded) -> list[tuple[int, int]]:
    """The stretches of tokens that are learnt."""
    marks = [label != IGNORED for label in encoded.labels]
    edges = [i for i in range(len(marks) + 1) if (i > 0 and marks[i - 1]) != (i < len(marks) and marks[i])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def test_only_the_assistants_tokens_and_its_end_of_turn_are_learnt(base: OpenBase) -> None:
    encoded = encode(TWO_TURNS, base.tokenizer, base.ends)
    assert base.tokenizer.decode(list(encoded.ids)) == (
        "<|system|>be brief<|end|>\n<|user|>one<|end|>\n<|assistant|>uno<|end|>\n"
        "<|user|>two<|end|>\n<|assistant|>dos<|end|>\n"
    )
    assert [base.tokenizer.decode(list(encoded.ids[a:b])) for a, b in spans(encoded)] == ["uno<|end|>", "dos<|end|>"]
    assert all(label in (IGNORED, token) for label, token in zip(encoded.labels, encoded.ids, strict=True))
    assert encoded.end == base.tokenizer.eos_token_id


def test_what_is_asked_is_what_serving_would_ask(base: OpenBase) -> None:
    encoded = encode(TWO_TURNS, base.tokenizer, base.ends)
    asked = [{"role": message.role, "content": message.content} for message in TWO_TURNS.messages[:2]]
    served = base.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(encoded.prompt) == served


def test_the_mask_is_the_one_that_generation_markers_give(make_base: MakeBase) -> None:
    """Oracle: transformers' assistant mask, on the shipped base, whose template has markers."""
    base = open_base("seedling")
    messages = [{"role": message.role, "content": message.content} for message in TWO_TURNS.messages]
    oracle: Any = base.tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    encoded = encode(TWO_TURNS, base.tokenizer, base.ends)
    assert list(encoded.ids) == oracle["input_ids"]
    assert [int(label != IGNORED) for label in encoded.labels] == oracle["assistant_masks"]


def test_markers_serve_where_a_template_drops_earlier_answers(make_base: MakeBase) -> None:
    base = open_base(str(make_base(FORGETFUL)))
    encoded = encode(TWO_TURNS, base.tokenizer, base.ends)
    assert learnt(base, encoded) == "dos<|end|>"


def test_a_template_without_markers_that_drops_earlier_answers_is_refused(make_base: MakeBase) -> None:
    template = FORGETFUL.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    base = open_base(str(make_base(template)))
    with pytest.raises(TemplateUnfit, match="does not render a conversation as an extension"):
        encode(TWO_TURNS, base.tokenizer, base.ends)


def test_a_template_that_never_ends_a_turn_is_refused(make_base: MakeBase) -> None:
    base = open_base(str(make_base("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")))
    with pytest.raises(TemplateUnfit, match="no end-of-turn token"):
        encode(TWO_TURNS, base.tokenizer, base.ends)


def test_a_base_without_a_chat_template_takes_prompts_but_no_messages(make_base: MakeBase) -> None:
    base = open_base(str(make_base(None)))
    with pytest.raises(TemplateUnfit, match="no chat template"):
        encode(TWO_TURNS, base.tokenizer, base.ends)
    assert encode(Completion("ab", "c"), base.tokenizer, base.ends).end == base.tokenizer.eos_token_id


def test_a_completion_is_learnt_with_the_end_of_the_text(base: OpenBase) -> None:
    encoded = encode(Completion("one ", "uno"), base.tokenizer, base.ends)
    assert base.tokenizer.decode(list(encoded.prompt)) == "one "
    assert learnt(base, encoded) == "uno<|end|>"


def test_long_rows_are_left_out_and_counted(base: OpenBase) -> None:
    rows = [Row(f"x:{n}", Completion("a", "b" * n)) for n in (1, 30, 2, 40)]
    found = encode_rows(rows, base.tokenizer, max_length=20, ends=base.ends)
    assert ([len(row.ids) for row in found.rows], found.too_long) == ([3, 4], 2)


def test_nothing_but_long_rows_is_refused_with_the_shortest(base: OpenBase) -> None:
    rows = [Row(f"x:{n}", Completion("a", "b" * n)) for n in (40, 30)]
    with pytest.raises(DataUnusable, match="all 2 rows are longer than max_length 20 tokens; the shortest has 32"):
        encode_rows(rows, base.tokenizer, max_length=20, ends=base.ends)


def test_rows_that_the_template_refuses_are_named(make_base: MakeBase) -> None:
    base = open_base(str(make_base("{{ raise_exception('roles must alternate') }}")))
    with pytest.raises(DataInvalid, match="x:7: the base's chat template refuses it: roles must alternate"):
        encode_rows([Row("x:7", TWO_TURNS)], base.tokenizer, max_length=20, ends=base.ends)
