import copy
import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given

from stores import spec
from stores.errors import FormatError
from tests.stores.build import MemoryObjects, arithmetic, make_plan, plans, write_into

NASTY = [None, True, -1, 0, 2**70, 1.5, float("inf"), float("nan"), "", "x", "../x", [], [1], [None], {}, {"a": 1}]


def places_in(value: Any) -> list[tuple[Any, ...]]:
    """The path of every value within a JSON value, its own included."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    return [(), *((key, *rest) for key, inner in items for rest in places_in(inner))]


def with_value_at(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return new
    value = copy.copy(value)
    value[place[0]] = with_value_at(value[place[0]], place[1:], new)
    return value


def plain(value: Any) -> Any:
    return json.loads(spec.canonical_json(value))


@pytest.fixture(scope="module")
def sealed() -> MemoryObjects:
    objects = MemoryObjects()
    write_into(objects, make_plan(n_samples=3))
    return objects


PLAN = plain(make_plan().to_json())


@arithmetic
@given(plans())
def test_a_plan_survives_json(plan: spec.StorePlan) -> None:
    assert spec.StorePlan.from_json(plain(plan.to_json())) == plan


def test_a_manifest_and_a_receipt_survive_json(sealed: MemoryObjects) -> None:
    for form, key in ((spec.Manifest, spec.MANIFEST_KEY), (spec.Receipt, spec.receipt_key(0))):
        data = sealed.read(key)
        assert spec.canonical_json(form.from_json(json.loads(data)).to_json()) == data


def test_the_digest_of_a_plan_is_pinned() -> None:
    # It changes only together with FORMAT_VERSION: stores that exist are resumed and shared by it.
    assert spec.FORMAT_VERSION == 1
    assert make_plan().digest == "10270c90dfd75da4c1f0df37721b3b367caf6c7ca994cb895032027792c03e21"


@pytest.mark.parametrize("change", [{"seed": 1}, {"n_samples": 38}, {"rows_per_chunk": 12}, {"n_tokens": 6}], ids=str)
def test_the_digest_changes_with_the_plan(change: dict[str, int]) -> None:
    assert make_plan(**change).digest != make_plan().digest


def breaks(read: Callable[[Any], object], good: Any) -> list[str]:
    """Put every nasty value in every place of a JSON value: what a reader answers with another error than its own."""
    broken: list[str] = []
    for place, nasty in itertools.product(places_in(good), NASTY):
        try:
            read(with_value_at(good, place, nasty))
        except FormatError:
            pass
        except Exception as error:
            broken.append(f"{nasty!r} at {'.'.join(map(str, place))}: {error!r}")
    return broken


def test_no_value_in_a_plan_breaks_its_reader() -> None:
    assert breaks(spec.StorePlan.from_json, PLAN) == []


def test_no_value_in_a_receipt_breaks_its_reader(sealed: MemoryObjects) -> None:
    assert breaks(spec.Receipt.from_json, json.loads(sealed.read(spec.receipt_key(0)))) == []


def test_no_value_in_a_manifest_breaks_its_reader(sealed: MemoryObjects) -> None:
    assert breaks(spec.Manifest.from_json, json.loads(sealed.read(spec.MANIFEST_KEY))) == []


@pytest.mark.parametrize(
    "name", ["sample", "token", "commits", "c", "zarr.json", "plan.json", "manifest.json", "statistics.json"]
)
def test_a_layer_cannot_have_the_name_of_another_object(name: str) -> None:
    with pytest.raises(FormatError, match=f"expected a layer name other than .*found '{name}'"):
        spec.Layer(name=name, dtype="float16", width=1)


def test_a_layer_cannot_have_the_name_of_the_samples_table() -> None:
    with pytest.raises(FormatError, match="expected a layer name other than"):
        spec.Layer(name=spec.SAMPLES_KEY, dtype="float16", width=1)


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "a b", "/a"])
def test_a_layers_name_is_one_safe_path_part(name: str) -> None:
    with pytest.raises(FormatError):
        spec.Layer(name=name, dtype="float16", width=1)


@pytest.mark.parametrize("width", [0, -1, (1 << 20) + 1, 5.0, 5.5, True, "5"], ids=repr)
def test_a_width_that_is_no_integer_from_1_to_2_to_the_20_is_refused(width: Any) -> None:
    with pytest.raises(FormatError, match=r"layer x: expected a width from 1 to 2\^20, found"):
        spec.Layer(name="x", dtype="float16", width=width)


@pytest.mark.parametrize("dtype", ["float64", "int8", "", None])
def test_a_dtype_that_stores_do_not_have_is_refused(dtype: Any) -> None:
    with pytest.raises(FormatError, match="layer x: expected dtype float16 or float32 or bfloat16, found"):
        spec.Layer(name="x", dtype=dtype, width=1)


def test_layers_of_the_same_name_are_refused() -> None:
    with pytest.raises(FormatError, match="at least one layer, each once"):
        make_plan(layers=(("x", "float16", 1), ("x", "float32", 2)))


def test_a_plan_without_layers_is_refused() -> None:
    with pytest.raises(FormatError, match="at least one layer"):
        make_plan(layers=())


@pytest.mark.parametrize("positions", [(0, 1), (0, 1, 2, 2)])
def test_as_many_positions_as_tokens_a_sample_are_expected(positions: tuple[int, ...]) -> None:
    plan = with_value_at(PLAN, ("tokens", "positions"), list(positions))
    with pytest.raises(FormatError, match=f"expected 3 token positions, found {len(positions)}"):
        spec.StorePlan.from_json(plan)


@pytest.mark.parametrize("position", [-2, 3, 32_768, 10**6])
def test_a_position_that_is_of_no_kind_or_that_int16_cannot_hold_is_refused(position: int) -> None:
    with pytest.raises(FormatError, match=f"position.*{position}"):
        spec.StorePlan.from_json(with_value_at(PLAN, ("tokens", "positions"), [0, 1, position]))


@pytest.mark.parametrize(("position", "kind"), [(-1, "mean"), (0, "cls"), (1, "patch"), (2, "patch")])
def test_a_position_is_of_the_kind_whose_range_holds_it(position: int, kind: str) -> None:
    assert make_plan().tokens.kind(position) == kind


@pytest.mark.parametrize("value", [{}, [], None, {"format": "other", "format_version": 1}], ids=repr)
def test_metadata_of_another_format_are_refused(value: Any) -> None:
    with pytest.raises(FormatError, match="expected metadata of format 'softbudget-activations'"):
        spec.check_version(value)


@pytest.mark.parametrize("version", [0, 2, "1", None], ids=repr)
def test_an_unknown_format_version_is_refused_with_the_remedy(version: Any) -> None:
    with pytest.raises(FormatError, match=f"expected store format version 1, found {version!r}: read it with"):
        spec.check_version({"format": spec.FORMAT, "format_version": version})


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 5000, b"{'a': 1}"], ids=range(6))
def test_what_is_no_json_is_refused_by_its_name(data: bytes) -> None:
    with pytest.raises(FormatError, match=r"x\.json: expected JSON"):
        spec.parse_json(data, "x.json")
