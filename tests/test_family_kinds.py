"""What is matched is a recorded fact: no kind is lost in any family, with any version of transformers, without this failing."""

from __future__ import annotations

import itertools

import family_kinds
import family_table
import pytest
import test_families
import zoo
from packaging.version import Version

from moepatch.planning import make_plan

RECORD = family_kinds.read()
VERSIONS = family_kinds.versions(RECORD)
NEIGHBOURS = list(itertools.pairwise(VERSIONS))
RUN = f"if that is meant, run `python tests/family_kinds.py` with transformers {zoo.RELEASE} and `python tests/family_table.py`"


def nearest() -> str:
    """The recorded version that the installed transformers is held to: itself, else the newest that is older."""
    older = [version for version in VERSIONS if Version(version) <= Version(zoo.RELEASE)]
    return older[-1] if older else VERSIONS[0]


@pytest.mark.parametrize("name", [*zoo.FAMILIES, *zoo.EXTRA])
def test_a_family_has_the_kinds_that_are_recorded(name):
    if (why := zoo.absent(name)) is not None:
        pytest.skip(why)
    recorded = RECORD["versions"][nearest()]["families"].get(name)
    found = family_kinds.counts(make_plan(zoo.build(name)))
    assert recorded is not None or nearest() != zoo.RELEASE, f"{name} is not recorded: {RUN}"
    moved = family_kinds.changes(recorded["kinds"], found) if recorded else ""
    assert not moved, f"{name} with transformers {zoo.RELEASE}, against the record of {nearest()}: {moved}; {RUN}"


def test_no_recorded_family_has_left_the_zoo():
    for version, section in RECORD["versions"].items():
        assert set(section["families"]) <= {*zoo.FAMILIES, *zoo.EXTRA}, version


@pytest.mark.parametrize("older, newer", NEIGHBOURS)
def test_neighbouring_versions_have_the_same_kinds_but_for_exceptions_with_a_reason(older, newer):
    found = family_kinds.differences(RECORD["versions"][older], RECORD["versions"][newer])
    named = RECORD["exceptions"].get(f"{older} to {newer}", {})
    assert all(named.values())
    unnamed = {name: what for name, what in found.items() if name not in named}
    assert not unnamed, f"from transformers {older} to {newer}: {unnamed}"
    assert not set(named) - set(found), "exceptions that are none any more"


def test_what_a_newer_version_leaves_out_is_said():
    """A family that an older version has is in all newer ones too: a model that transformers drops would be an exception to name."""
    for older, newer in NEIGHBOURS:
        assert not set(RECORD["versions"][older]["families"]) - set(RECORD["versions"][newer]["families"])


def test_a_loss_and_a_gain_are_named_what_shrank_first():
    assert family_kinds.changes({"norm": 3, "router": 2}, {"norm": 3, "router": 2}) == ""
    assert family_kinds.changes({"norm": 3, "router": 2}, {"norm": 4}) == "router: 2 → 0, norm: 3 → 4"
    a, b = ({"families": {"x": {"kinds": {"norm": n}}, f"only {n}": {"kinds": {}}}} for n in (1, 2))
    assert family_kinds.differences(a, a) == {} and family_kinds.differences(a, b) == {"x": "norm: 1 → 2"}


def test_a_loss_is_not_written_unasked(tmp_path, monkeypatch, capsys):
    kept = {"families": {"x": {"kinds": {"norm": 2, "router": 1}, "seen": []}}}
    made = {"families": {"x": {"kinds": {"norm": 9}, "seen": []}}}
    monkeypatch.setattr(family_kinds, "ROOT", tmp_path)
    monkeypatch.setattr(family_kinds, "RECORD", tmp_path / "kinds.json")
    monkeypatch.setattr(family_kinds, "section", lambda former: made)
    before = family_kinds.text({"exceptions": {}, "versions": {zoo.RELEASE: kept}})
    family_kinds.RECORD.write_text(before)
    assert family_kinds.main([]) == 1 and "kinds are lost in x" in capsys.readouterr().out
    assert family_kinds.RECORD.read_text() == before
    assert family_kinds.main(["--losses"]) == 0 and family_kinds.read()["versions"] == {zoo.RELEASE: made}


def test_what_was_seen_is_kept_only_where_nothing_changed_since():
    plan, former = {"kinds": {"norm": 1}}, {"kinds": {"norm": 1}, "seen": ["fp32", "bf16"]}
    assert family_kinds.merged(plan, {}, None)["seen"] == []
    assert family_kinds.merged(plan, {}, former)["seen"] == ["fp32", "bf16"]
    assert family_kinds.merged(plan, {"fp32": False, "save and restore": True}, former)["seen"] == ["bf16", "save and restore"]
    assert family_kinds.merged({"kinds": {"norm": 2}}, {}, former)["seen"] == []


def test_the_tests_that_fill_the_record_are_there():
    assert all(hasattr(test_families, test) for test in family_kinds.SEES)


def test_the_record_is_written_as_the_script_writes_it():
    assert family_kinds.RECORD.read_text() == family_kinds.text(RECORD)


def test_the_table_of_the_readme_is_that_of_the_record():
    assert family_table.readme(RECORD) == family_table.README.read_text(), "README.md is stale: run `python tests/family_table.py`"
