"""docs/format.md is normative: its field tables must be those of the code."""

import re
from dataclasses import fields

import pytest

from stores import spec
from stores.layout import Layout
from stores.samples import SAMPLES_SCHEMA
from stores.statistics import Statistics
from tests.conftest import ROOT
from tests.stores.build import make_plan

TEXT = (ROOT / "docs" / "format.md").read_text()


def _table(title: str) -> list[str]:
    section = re.split(r"^#+ ", TEXT.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.M)[0]
    return re.findall(r"^\| `(\w+)` \|", section, flags=re.M)


@pytest.mark.parametrize(
    ("title", "kind"),
    [
        ("Layer", spec.Layer),
        ("Tokens", spec.Tokens),
        ("Layout", Layout),
        ("Receipt", spec.Receipt),
        ("Statistics", Statistics),
        ("ObjectRecord", spec.ObjectRecord),
    ],
)
def test_a_table_names_the_fields_of_its_dataclass(title: str, kind: type) -> None:
    assert _table(title) == [field.name for field in fields(kind)]


def test_the_plans_table_names_its_json_keys() -> None:
    assert _table("plan.json") == list(make_plan().to_json())


def test_the_manifests_table_names_its_json_keys() -> None:
    assert _table("manifest.json") == list(spec.Manifest(plan=make_plan(), n_failed=0, objects=()).to_json())


def test_the_samples_table_names_its_columns() -> None:
    assert _table("samples.parquet") == SAMPLES_SCHEMA.names


def test_the_version_is_the_codes() -> None:
    assert TEXT.startswith(f"# The activation store, format {spec.FORMAT_VERSION}\n")
