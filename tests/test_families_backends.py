"""The behaviour suite with other backends than the default ones: every backend that this machine can run computes what the family does."""

from __future__ import annotations

import compare
import pytest
import zoo
from test_families import SERVED, runnable

import moepatch
from moepatch import registry
from moepatch.carrying_out import apply, relayout
from moepatch.kinds import KINDS
from moepatch.planning import backend_options
from moepatch.surgery import Journal


def rounds(made):
    """Plans that together use every available backend of every table: the i-th takes the i-th of each. The plan as it was made is left out."""
    served = {table: backends(made, table) for table in backend_options()}
    for i in range(max(map(len, served.values()))):
        chosen = made.with_backends(**{table: names[i % len(names)] for table, names in served.items() if names})
        if [p.backend for p in chosen.patterns] != [p.backend for p in made.patterns]:
            yield chosen


def backends(made, table):
    """The backends of a table that can serve: a pattern of the dense half, or all that a mixture of experts has."""
    patterns = [p for p in made.patterns if KINDS[p.site.kind].backends == table]
    # A backend below rank 0 is of a lower precision: it is asked for by name only, and has tests of its own.
    asked = {b.name for b in registry.backends(table) if b.rank < 0}
    names = [[c.backend for c in p.choices if c.why_not is None and c.backend not in asked] for p in patterns]
    if any(KINDS[p.site.kind].dense for p in patterns):
        return list(dict.fromkeys(name for group in names for name in group))
    return [name for name in dict.fromkeys(sum(names, [])) if all(name in group for group in names)]


@pytest.mark.parametrize("name", SERVED)
def test_every_backend_computes_what_the_family_does(name):
    runnable(name)
    model = zoo.build(name)
    with compare.implementation(model, "eager"):
        truth = compare.step(name, model)
    made = moepatch.plan(model, numerics="relaxed", measure=False)
    used = set()
    for chosen in rounds(made):
        journal = Journal()
        apply(model, chosen, journal)
        relayout(model, chosen, journal)
        found = compare.step(name, model)
        journal.undo()
        compare.check_fp32(truth, found, lambda chosen=chosen: compare.noise(name, model, chosen, truth[1]))
        used |= {(KINDS[p.site.kind].backends, p.backend) for p in chosen.patterns}
    default = {(KINDS[p.site.kind].backends, p.backend) for p in made.patterns}
    assert used | default >= {(table, backend) for table in backend_options() for backend in backends(made, table)}
