"""Writes the table of families into README.md, from the record of what is matched (tests/data/kinds.json).

    python tests/family_kinds.py && python tests/family_table.py        with every transformers that is to be recorded
"""

from __future__ import annotations

import sys
from typing import Any

import family_kinds
import zoo

from moepatch.kinds import KINDS

README = family_kinds.ROOT / "README.md"
START, END = "<!-- families: written by tests/family_table.py -->", "<!-- end of families -->"


def table(record: dict[str, Any]) -> str:
    """One line per family: layout, activation, what else is patched, the versions, and what was seen."""
    versions = family_kinds.versions(record)
    lines = ["| family | experts | activation | dense half | transformers | status |", "|---|---|---|---|---|---|"]
    for name in sorted(zoo.FAMILIES):
        entries = {version: entry for version in versions if (entry := record["versions"][version]["families"].get(name))}
        lines.append("| " + " | ".join(_row(name, entries)) + " |")
    return "\n".join([*lines, "", *_sentences(record, versions)])


def _row(name: str, entries: dict[str, dict[str, Any]]) -> list[str]:
    if not entries:
        return [name, zoo.FAMILIES[name].layout, "–", "–", "–", "not run"]
    newest = list(entries.values())[-1]
    dense = dict.fromkeys(kind.pattern for kind in KINDS.values() if kind.dense and kind.name in newest["kinds"])
    return [
        name,
        newest.get("experts") or zoo.FAMILIES[name].layout,
        newest.get("activation") or "–",
        ", ".join(dense) or "–",
        f"from {next(iter(entries))}",
        status(entries),
    ]


def status(entries: dict[str, dict[str, Any]]) -> str:
    """What the tests saw of a family with the newest version that has it, in words; with the one before too where that cannot run it."""
    version, newest = list(entries.items())[-1]
    if "broken" in newest:
        older = {key: value for key, value in entries.items() if key != version}
        before = f"; with {list(older)[-1]} {status(older)}" if older else ""
        return f"does not run: {newest['broken']}{before}"
    if "refused" in newest["seen"]:
        return f"mixture refused: {newest['refused']}"
    return "✓ " + ", ".join(newest["seen"]) if newest["seen"] else "not run"


def _sentences(record: dict[str, Any], versions: list[str]) -> list[str]:
    """How many families are served with each version, and where two versions differ."""
    served = []
    for version in reversed(versions):
        section = record["versions"][version]
        have = [entry for name, entry in section["families"].items() if name in zoo.FAMILIES]
        whole = [entry for entry in have if {"fp32", "bf16", "save and restore"} <= set(entry["seen"])]
        served.append(f"{len(whole)} of {len(have)} with transformers {section['transformers']} (torch {section['torch']})")
    lines = [
        f"Patched, run forward and backward in fp32 and bf16, saved, reloaded and restored: {'; '.join(served)}.",
        "",
        "The table holds for the newest of these versions. The others have the same kinds in as many modules of every family, but for:",
        "",
    ]
    for pair, families in record["exceptions"].items():
        for reason in dict.fromkeys(families.values()):
            names = [name for name, given in families.items() if given == reason]
            lines.append(f"* {pair}: {', '.join(names)}. {reason[0].upper()}{reason[1:]}.")
    return lines


def readme(record: dict[str, Any]) -> str:
    """README.md with the table that the record gives."""
    before, rest = README.read_text().split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n{table(record)}\n{END}{after}"


def main() -> int:
    """Rewrites the README."""
    README.write_text(readme(family_kinds.read()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
