"""Which modules a config means, and which patterns are not even tried."""

from typing import Any

import pytest

from hub.base import Linear, Modules
from hub.targets import pattern_complaint, pattern_value, target_complaints, target_modules

NAMES = [
    f"model.layers.{layer}.{name}"
    for layer in (0, 1, 11)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
]
MODULES = Modules({name: Linear(4, 4) for name in [*NAMES, "lm_head"]}, frozenset({"model.embed_tokens", "model.norm"}))


def chosen(**config: Any) -> list[str]:
    return list(target_modules(config, MODULES))


def test_a_list_names_modules_by_their_end() -> None:
    assert chosen(target_modules=["q_proj"]) == [name for name in NAMES if name.endswith(".q_proj")]
    assert chosen(target_modules=["self_attn.q_proj", "lm_head"])[-1] == "lm_head"
    assert chosen(target_modules=["proj"]) == []


def test_a_text_is_a_pattern_over_the_whole_name() -> None:
    assert chosen(target_modules=r".*\.1\..*_proj") == [name for name in NAMES if ".1." in name]
    assert chosen(target_modules="q_proj") == []


def test_all_linear_leaves_out_the_head() -> None:
    assert chosen(target_modules="all-linear") == NAMES


def test_layers_and_exclusions_narrow_a_list() -> None:
    assert chosen(target_modules=["q_proj"], layers_to_transform=[1]) == ["model.layers.1.self_attn.q_proj"]
    assert chosen(target_modules=["q_proj"], layers_to_transform=11) == ["model.layers.11.self_attn.q_proj"]
    assert chosen(target_modules=["q_proj"], layers_to_transform=1, layers_pattern="h") == []
    assert chosen(target_modules=["q_proj"], layers_to_transform=0, layers_pattern=["h", "layers"]) == NAMES[:1]
    assert chosen(target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"]) == chosen(target_modules=["q_proj"])
    assert chosen(target_modules=["q_proj"], exclude_modules=r".*layers\.1.*") == NAMES[:1]


def test_the_first_pattern_that_fits_the_end_of_a_name_gives_its_value() -> None:
    patterns = {"q_proj": 2, r"layers\.1\..*": 3}
    assert pattern_value(patterns, "model.layers.1.self_attn.q_proj", 8) == 2
    assert pattern_value(patterns, "model.layers.1.mlp.down_proj", 8) == 3
    assert pattern_value(patterns, "model.layers.11.mlp.down_proj", 8) == 8
    assert pattern_value({"proj": 2}, "model.layers.1.self_attn.q_proj", 8) == 8


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"target_modules": ["q_proj", "k_prj"]}, "k_prj is not in the base"),
        ({"target_modules": ["down_prj"]}, "did you mean down_proj"),
        ({"target_modules": ["embed_tokens"]}, "no Linear layer"),
        ({"target_modules": r".*nothing"}, "fits no Linear"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [99]}, "is left"),
    ],
)
def test_what_the_base_does_not_have_is_told(config: dict[str, Any], complaint: str) -> None:
    assert complaint in " ".join(target_complaints(config, MODULES))


@pytest.mark.parametrize(
    "pattern",
    [r"q_proj", r".*\.(q|v)_proj$", r"model\.layers\.(\d|1\d)\.self_attn\.q_proj", r".*(?:self_attn|mlp)\.[a-z]+_proj",
     r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:k_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.mlp)"],
)  # fmt: skip
def test_patterns_as_people_write_them_are_accepted(pattern: str) -> None:
    assert pattern_complaint(pattern) is None


@pytest.mark.parametrize(
    "pattern",
    [r"(a+)+$", r"(a|a)*b", r"(.*a){30}", r"(?=.*x).*", r"(a)\1", "(", "[", "a**", ".*" * 6, "x" * 2001,
     r"(?:(?:a?){30}){30}", "(?P<idx>x)", "a)|(b", "(" * 500, "[[a]]"],
)  # fmt: skip
def test_a_pattern_that_could_take_for_ever_is_never_tried(pattern: str) -> None:
    assert pattern_complaint(pattern) is not None
