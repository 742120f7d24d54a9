from __future__ import annotations

from typing import Any

import pytest

from server.api.choose import Terms, choose
from server.api.requests import ChatBody
from server.errors import InvalidValue, MixtureRefused, ServerError, UnsupportedParameter

BASES = frozenset({"seedling"})


def pick(*, whole: tuple[str, ...] = (), bases: frozenset[str] = BASES, **fields: Any) -> Terms:
    body = ChatBody.model_validate({"messages": [{"role": "user", "content": "x"}], **fields})
    return choose(body, base_names=bases, whole_names=whole)


@pytest.mark.parametrize(
    ("fields", "terms"),
    [
        ({}, ()),
        ({"model": None}, ()),
        ({"model": ""}, ()),
        ({"model": "seedling"}, ()),
        ({"model": "legal"}, (("legal", 1.0),)),
        ({"model": "team/legal@sha256:0123456789ab"}, (("team/legal@sha256:0123456789ab", 1.0),)),
        ({"model": "legal@prod*0.7+tone*0.3"}, (("legal@prod", 0.7), ("tone", 0.3))),
        ({"model": "a*-1+b*2e-3"}, (("a", -1.0), ("b", 0.002))),
        ({"model": "seedling:legal@2"}, (("legal@2", 1.0),)),
        ({"model": "seedling:a+b"}, (("a", 1.0), ("b", 1.0))),
        ({"model": "seedling", "adapters": [{"ref": "a@1", "weight": 0.5}, {"ref": "b"}]}, (("a@1", 0.5), ("b", 1.0))),
        ({"model": "seedling", "adapters": []}, ()),
        ({"lora_path": "legal@prod"}, (("legal@prod", 1.0),)),
        ({"lora_path": None, "model": "legal"}, (("legal", 1.0),)),
        ({"adapter_id": "legal", "adapter_source": "hub"}, (("legal", 1.0),)),
        ({"merged_adapters": {"ids": ["a", "b"], "weights": [0.5, 1]}}, (("a", 0.5), ("b", 1.0))),
        (
            {"merged_adapters": {"ids": ["a"], "weights": [1.0], "merge_strategy": "linear", "density": 0.0}},
            (("a", 1.0),),
        ),
        ({"lora": [{"id": "a", "scale": 0.5}]}, (("a", 0.5),)),
        ({"model": "a", "adapters": [{"ref": "a"}]}, (("a", 1.0),)),
        ({"model": "seedling", "lora_path": "a", "adapter_id": "a"}, (("a", 1.0),)),
    ],
)
def test_every_way_of_choosing_means_the_same_terms(fields: dict[str, Any], terms: Terms) -> None:
    fields.pop("adapter_source", None)  # a field that the table of fields takes off before
    assert pick(**fields) == terms


def test_a_base_whose_id_holds_a_colon_is_not_split() -> None:
    bases = frozenset({"gpt-oss:120b"})
    assert pick(model="gpt-oss:120b", bases=bases) == ()
    assert pick(model="gpt-oss:120b:legal", bases=bases) == (("legal", 1.0),)


def test_a_served_name_that_looks_like_a_mixture_is_taken_whole() -> None:
    assert pick(model="a+b*2", whole=("a+b*2",)) == (("a+b*2", 1.0),)
    assert pick(model="seedling:a", whole=("seedling:a",)) == (("seedling:a", 1.0),)


@pytest.mark.parametrize(
    "model", ["a+", "+a", "a*", "a*x", "a*nan", "a*inf", "*0.5", "a**2", "seedling:", "a* 2", "a*1e+3"]
)
def test_what_is_no_mixture_is_quoted_back(model: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        pick(model=model)
    assert caught.value.param == "model"


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "./a", "../a", "~/a", "a/../b", "C:\\a", "s3://bucket/a", "https://x/y"]
)
@pytest.mark.parametrize("field", ["lora_path", "adapter_id"])
def test_paths_and_addresses_are_not_references(field: str, path: str) -> None:
    with pytest.raises(InvalidValue, match="not a path") as caught:
        pick(**dict[str, Any]({field: path}))
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "a", "lora_path": "b"}, "lora_path"),
        ({"model": "a", "adapters": [{"ref": "a", "weight": 0.5}]}, "adapters"),
        ({"adapter_id": "a", "lora": [{"id": "b", "scale": 1.0}]}, "lora"),
        ({"model": "a", "merged_adapters": {"ids": ["b"], "weights": [1.0]}}, "merged_adapters"),
        ({"lora_path": "seedling", "adapters": [{"ref": "a"}]}, "adapters"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidValue, match="choose different adapters") as caught:
        pick(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize("strategy", ["ties", "dare_linear", "dare_ties", "svd"])
def test_a_merge_that_is_no_exact_sum_is_refused(strategy: str) -> None:
    with pytest.raises(UnsupportedParameter, match=strategy):
        pick(merged_adapters={"ids": ["a"], "weights": [1.0], "merge_strategy": strategy})


def test_as_many_weights_as_adapters() -> None:
    with pytest.raises(MixtureRefused, match="2 ids and 1 weights"):
        pick(merged_adapters={"ids": ["a", "b"], "weights": [1.0]})


def test_auto_leaves_the_choice_to_the_prompt_unless_somebody_is_called_so() -> None:
    assert pick(model="auto") == ()
    assert pick(model="auto", whole=("auto",)) == (("auto", 1.0),)
    with pytest.raises(InvalidValue, match="only the field model") as caught:
        pick(adapter_id="auto")
    assert isinstance(caught.value, ServerError)
    assert caught.value.param == "adapter_id"
