"""The record of what is matched, tests/data/kinds.json: version of transformers × family → kinds × counts, and what was seen of it.

    python tests/family_kinds.py              writes the section of the installed transformers
    python tests/family_kinds.py --losses     also where there are fewer modules of a kind than before

A section is made from plans of the zoo. What was seen of a family comes from the behaviour suite's own results (build/families) and
from nowhere else: run tests/test_families.py before. A family that it has not run since keeps what was recorded, as long as its kinds
are the same. The exceptions are written by hand: where two neighbouring versions may differ in a family, and why.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
import zoo
from packaging.version import Version

from moepatch.planning import Plan, make_plan

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "tests" / "data" / "kinds.json"
#: Where the behaviour suite leaves its results: one file a family and test.
RESULTS = ROOT / "build" / "families" / f"transformers-{transformers.__version__}-torch-{Version(torch.__version__).base_version}"
#: The tests of the behaviour suite, and what a family has done that came through.
SEES = {
    "test_fp32_outputs_and_gradients_are_those_of_the_unpatched_model": "fp32",
    "test_bf16_error_against_fp32_is_at_most_half_again_that_of_transformers": "bf16",
    "test_save_reload_restore_are_bit_equal": "save and restore",
    "test_of_families_that_are_not_served_the_mixture_is_refused_in_words_and_the_rest_patched": "refused",
}
#: What a layout's name does not say.
EXTRAS = ("post-norm", "input-scaled", "identity")


def read() -> dict[str, Any]:
    """The record as it is committed."""
    return json.loads(RECORD.read_text())


def versions(record: dict[str, Any]) -> list[str]:
    """The recorded versions of transformers, oldest first."""
    return sorted(record["versions"], key=Version)


def counts(plan: Plan) -> dict[str, int]:
    """How many modules of each kind a plan has."""
    found: Counter[str] = Counter()
    for pattern in plan.patterns:
        found[pattern.site.kind] += len(pattern.sites)
    return dict(sorted(found.items()))


def facts(plan: Plan) -> dict[str, Any]:
    """What a plan says of a family: its kinds, and layout and activation of its experts."""
    said: dict[str, Any] = {"kinds": counts(plan)}
    if plan.mixture:
        specs = [pattern.site.spec for pattern in plan.mixture]
        extras = [word for word in EXTRAS if word in specs[0].describe()]
        said["experts"] = ", ".join(dict.fromkeys([*(spec.to_dict()["layout"] for spec in specs), *extras]))
        said["activation"] = specs[0].to_dict().get("activation", "")
    if plan.refusals:
        said["refused"] = plan.refusals[0].reason
    return said


def merged(plan_facts: dict[str, Any], passed: dict[str, bool], former: dict[str, Any] | None) -> dict[str, Any]:
    """The entry of one family: what its plan says, and what the suite saw.

    What has no result now stays as it was recorded, if the kinds are what they were.
    """
    kept = former.get("seen", ()) if former is not None and former["kinds"] == plan_facts["kinds"] else ()
    seen = [what for what in SEES.values() if passed.get(what, what in kept)]
    return {**plan_facts, "seen": seen}


def results() -> dict[str, dict[str, bool]]:
    """What the behaviour suite saw with the installed versions, by family: whether each test came to its end."""
    found: dict[str, dict[str, bool]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        found.setdefault(result["family"], {})[result["what"]] = result["passed"]
    return found


def section(former: dict[str, Any]) -> dict[str, Any]:
    """The section of the installed transformers: every family of the zoo that it can build."""
    seen, families = results(), {}
    for name in sorted((*zoo.FAMILIES, *zoo.EXTRA)):
        if zoo.absent(name) is None:
            families[name] = merged(facts(make_plan(zoo.build(name))), seen.get(name, {}), former.get(name))
            if zoo.available(name) is not None:
                families[name]["broken"] = zoo.available(name)
    return {"transformers": transformers.__version__, "torch": Version(torch.__version__).base_version, "families": families}


def differences(older: dict[str, Any], newer: dict[str, Any]) -> dict[str, str]:
    """Families that both sections have and whose kinds are not the same, with the counts."""
    both = [name for name in older["families"] if name in newer["families"]]
    found = {name: changes(older["families"][name]["kinds"], newer["families"][name]["kinds"]) for name in both}
    return {name: text for name, text in found.items() if text}


def changes(old: dict[str, int], new: dict[str, int]) -> str:
    """In words what became of the counts, what shrank first; empty where they are equal."""
    moved = sorted((new.get(kind, 0) - old.get(kind, 0), kind) for kind in {*old, *new})
    return ", ".join(f"{kind}: {old.get(kind, 0)} → {new.get(kind, 0)}" for by, kind in moved if by)


def text(record: dict[str, Any]) -> str:
    """The record as JSON with one line a family, so that a diff names it."""
    whole = json.dumps(record, indent=1, ensure_ascii=False)

    def line(match: re.Match) -> str:
        return match[1] + json.dumps(json.loads(match[2]), ensure_ascii=False)

    return re.sub(r'^(    "\w+": )(\{\n(?:     .*\n)+    \})', line, whole, flags=re.MULTILINE) + "\n"


def lost(old: dict[str, int], new: dict[str, int]) -> bool:
    """Whether there are fewer modules of some kind."""
    return any(new.get(kind, 0) < count for kind, count in old.items())


def main(arguments: list[str]) -> int:
    """Writes the section of the installed transformers and says what changed in it; refuses to write a loss that was not asked for."""
    record = read()
    former = record["versions"].get(zoo.RELEASE, {"families": {}})
    made = section(former["families"])
    moved = differences(former, made)
    for name, what in moved.items():
        print(f"{name:27}{what}")
    losses = [name for name in moved if lost(former["families"][name]["kinds"], made["families"][name]["kinds"])]
    losses += [name for name in former["families"] if name not in made["families"]]
    if losses and "--losses" not in arguments:
        print(f"Nothing is written: kinds are lost in {', '.join(losses)}. If that is meant: python tests/family_kinds.py --losses")
        return 1
    record["versions"][zoo.RELEASE] = made
    record["versions"] = {version: record["versions"][version] for version in versions(record)}
    RECORD.write_text(text(record))
    unseen = [name for name, entry in made["families"].items() if not entry["seen"]]
    print(f"transformers {zoo.RELEASE}: {len(made['families'])} models in {RECORD.relative_to(ROOT)}; the behaviour suite has not seen: {unseen}")
    return 0


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
