"""Laws of the one identity: order is nothing, every byte is something."""

from typing import Any

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hub.digest import adapter_digest, sha256_of
from hub.methods import canonical_config
from hub.strict_json import canonical, parse, readable

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)
configs = st.dictionaries(texts, values, max_size=5)
files = st.dictionaries(texts, st.binary(max_size=8).map(sha256_of), max_size=4)


@settings(deadline=None)
@given(values)
def test_canonical_and_readable_texts_are_read_back(value: Any) -> None:
    assert parse(canonical(value)) == value
    assert parse(readable(value)) == value


@settings(deadline=None)
@given(configs, files, st.randoms())
def test_the_order_of_keys_and_files_changes_nothing(config: dict[str, Any], kept: dict[str, str], random: Any) -> None:
    keys, paths = list(config), list(kept.items())
    random.shuffle(keys)
    random.shuffle(paths)
    assert adapter_digest(config, kept.items()) == adapter_digest({key: config[key] for key in keys}, paths)


@settings(deadline=None)
@given(configs, files, st.data())
def test_another_content_or_name_of_one_file_changes_the_digest(
    config: dict[str, Any], kept: dict[str, str], data: st.DataObject
) -> None:
    assume(kept)
    path = data.draw(st.sampled_from(sorted(kept)))
    changed = {**kept, path: sha256_of(kept[path].encode())}
    renamed = {(f"{name}." if name == path else name): sha256 for name, sha256 in kept.items()}
    missing = {name: sha256 for name, sha256 in kept.items() if name != path}
    whole = adapter_digest(config, kept.items())
    assert all(adapter_digest(config, other.items()) != whole for other in (changed, missing))
    assert len(renamed) < len(kept) or adapter_digest(config, renamed.items()) != whole


@settings(deadline=None)
@given(configs, files, configs, files)
def test_another_config_or_another_file_has_another_digest(
    config: dict[str, Any], kept: dict[str, str], other_config: dict[str, Any], other_kept: dict[str, str]
) -> None:
    assume(canonical(config) != canonical(other_config) or kept != other_kept)
    assert adapter_digest(config, kept.items()) != adapter_digest(other_config, other_kept.items())


@settings(deadline=None)
@given(st.lists(texts, max_size=5), st.randoms())
def test_set_like_lists_are_sets(names: list[str], random: Any) -> None:
    shuffled = [*names, *names[:1]]
    random.shuffle(shuffled)
    for key in ("target_modules", "exclude_modules", "feedforward_modules"):
        assert canonical_config({key: names}) == canonical_config({key: shuffled})
