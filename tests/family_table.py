"""Writes the table of families into README.md from what the behaviour suite recorded (build/families/VERSION/*.json, of the newest version).

    make test && python tests/family_table.py            rewrites the table between the markers
    python tests/family_table.py --check                 exits with 1 if the table is not what the results say
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import zoo
from packaging.version import Version

ROOT = Path(__file__).parents[1]
START, END = "<!-- families: written by tests/family_table.py -->", "<!-- end of families -->"


def results() -> dict[str, dict]:
    """The recorded facts of each family, merged over the tests that recorded them."""
    merged: dict[str, dict] = defaultdict(dict)
    newest = max((ROOT / "build" / "families").iterdir(), key=lambda folder: Version(folder.name))
    for path in sorted(newest.glob("*.json")):
        facts = json.loads(path.read_text())
        merged[facts.pop("family")] |= facts
    return merged


def table(facts: dict[str, dict]) -> str:
    """One line per family: layout, activation, what else is patched, and what was seen."""
    lines = ["| family | experts | activation | dense half | status |", "|---|---|---|---|---|"]
    served = 0
    for name in sorted(zoo.FAMILIES):
        found = facts.get(name, {})
        layout = ", ".join(dict.fromkeys(part.split(": ", 1)[-1] for part in found.get("layout", "").split("; ") if part))
        dense = ", ".join(found.get("dense", [])) or "–"
        lines.append(f"| {name} | {layout or zoo.FAMILIES[name].layout} | {found.get('activation', '') or '–'} | {dense} | {status(found)} |")
        served += "fp32" in found
    lines.append("")
    lines.append(f"{served} of {len(zoo.FAMILIES)} families are patched, each run forward and backward in fp32 and bf16, saved, reloaded and restored.")
    return "\n".join(lines)


def status(found: dict) -> str:
    """What the tests saw of a family, in words."""
    if "refused" in found:
        return f"mixture refused: {found['refused']}"
    seen = [word for key, word in (("fp32", "fp32"), ("bf16", "bf16"), ("saved", "save and restore")) if key in found]
    return "✓ " + ", ".join(seen) if seen else "not run"


def main(arguments: list[str]) -> int:
    """Rewrites or checks the README."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(START)
    _, after = rest.split(END)
    made = f"{before}{START}\n{table(results())}\n{END}{after}"
    if "--check" in arguments:
        print("README.md is up to date" if made == text else "README.md differs from the results: run python tests/family_table.py")
        return int(made != text)
    readme.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
