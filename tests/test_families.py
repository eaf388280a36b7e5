"""The behaviour suite: every MoE family of transformers, patched against unpatched."""

from __future__ import annotations

import compare
import pytest
import torch
import zoo
from facts import facts
from safetensors import safe_open

import moepatch

#: Families whose experts are not in few large parameters: refused in words (a later version stacks lists of modules).
REFUSED = {
    "doge": "no matcher takes a mixture of this form",
    "nllb_moe": "separate modules",
    "switch_transformers": "separate modules",
    "vitpose_backbone": "separate modules",
}
#: Of those, the ones whose dense half has nothing that is patched either.
NOTHING = {"vitpose_backbone"}
SERVED = [name for name in (*zoo.FAMILIES, *zoo.EXTRA) if name not in REFUSED]
#: Families that transformers itself cannot run in bf16.
NO_BF16 = {"deepseek_v4": "transformers 5.17 feeds fp32 norms into bf16 linears"} if zoo.RELEASE == "5.17" else {}
#: How many of the 81 families must be patched and run forward and backward, by release; a newer one as many as the newest here.
EXPECTED = {"5.17": 61, "5.23": 72, "5.24": 76}


def runnable(name: str) -> None:
    """Skips, with the reason, what this version of transformers does not have. `test_no_family_is_missing` counts what is left."""
    why = zoo.available(name)
    if why is not None:
        pytest.skip(why)


@pytest.mark.parametrize("name", SERVED)
def test_fp32_outputs_and_gradients_are_those_of_the_unpatched_model(name, seen):
    runnable(name)
    model = zoo.build(name)
    agrees_in_fp32(name, model)
    assert moepatch.report(model).plan.mixture
    seen()


def agrees_in_fp32(name, model):
    """Patches a model after an unpatched step and compares."""
    with compare.implementation(model, "eager"):
        truth = compare.step(name, model)
    moepatch.optimize(model)
    made = moepatch.report(model).plan
    compare.check_fp32(truth, compare.step(name, model), lambda: compare.noise(name, zoo.build(name), made, truth[1]))


@pytest.mark.parametrize("name", SERVED)
def test_bf16_error_against_fp32_is_at_most_half_again_that_of_transformers(name, seen):
    runnable(name)
    if name in NO_BF16:
        pytest.skip(NO_BF16[name])
    found = _bf16_errors(name, seed=0)
    if max(found.values()) > 1.5:
        # Some routers have thresholds whose side is a matter of rounding. A loss of precision would show for every seed.
        found = max((_bf16_errors(name, seed) for seed in (1, 2)), key=lambda errors: max(errors.values()))
    assert max(found.values()) <= 1.5, found
    seen()


def _bf16_errors(name, seed):
    """Our error against fp32 divided by that of transformers, for the outputs and two groups of gradients."""
    truth_model, model = zoo.build(name, seed=seed), zoo.build(name, dtype=torch.bfloat16, seed=seed)
    with compare.PinnedRouting(truth_model) as pins:
        truth = compare.step(name, truth_model)
    with compare.PinnedRouting(model, pins):
        theirs = compare.step(name, model)
        moepatch.optimize(model)
        ours = compare.step(name, model)
    groups = compare.parts(model, ours, theirs, truth)
    return {what: compare.together(a, c) / max(compare.together(b, c), 1e-5) for what, (a, b, c) in groups.items()}


@pytest.mark.parametrize("name", SERVED)
def test_save_reload_restore_are_bit_equal(name, tmp_path, seen):
    runnable(name)
    source = zoo.build(name)

    def load(path):
        # Some families are another family's classes under a configuration of their own, which names the layout on disk.
        return type(source).from_pretrained(path, config=type(source.config).from_pretrained(path))

    source.save_pretrained(tmp_path / "source")
    layouts = {"hub": {}, "fused": {"save_original_format": False}}
    for layout, options in layouts.items():
        source.save_pretrained(tmp_path / f"{layout}-source", **options)
        model = load(tmp_path / f"{layout}-source")
        before = facts(model)
        model.save_pretrained(tmp_path / f"{layout}-vanilla")
        moepatch.optimize(model)
        assert list(model.state_dict()) == [key for key, *_ in before["state"]]
        model.save_pretrained(tmp_path / f"{layout}-patched")
        assert_same_files(tmp_path / f"{layout}-vanilla", tmp_path / f"{layout}-patched")
        reloaded = load(tmp_path / f"{layout}-patched")
        assert {type(m) for m in reloaded.modules()} == {type(m) for m in source.modules()}
        _assert_equal_state(reloaded, load(tmp_path / f"{layout}-vanilla"))
        moepatch.restore(model)
        assert facts(model) == before
    seen()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_of_families_that_are_not_served_the_mixture_is_refused_in_words_and_the_rest_patched(name, seen):
    runnable(name)
    model = zoo.build(name)
    compare.step(name, model)  # some modules remember things of their first forward
    model.zero_grad(set_to_none=True)
    before = facts(model)
    with pytest.raises(moepatch.NothingMatched, match=REFUSED[name]):
        moepatch.optimize(model, dense=False)
    assert facts(model) == before
    if name in NOTHING:
        with pytest.raises(moepatch.NothingMatched, match=REFUSED[name]):
            moepatch.optimize(model)
        seen()
        return
    agrees_in_fp32(name, model)
    report = moepatch.report(model)
    assert not report.plan.mixture and all(REFUSED[name] in refusal.reason for refusal in report.plan.refusals)
    assert report.plan.refusals and REFUSED[name] in str(report)
    model.zero_grad(set_to_none=True)
    moepatch.restore(model)
    assert facts(model) == before
    seen()


def test_no_family_is_missing():
    """Every family is patched, or refused by name above, or absent from this version with a reason; and their number is known."""
    absent = {name: zoo.available(name) for name in zoo.FAMILIES if zoo.available(name) is not None}
    assert all(absent.values()), "a family without a reason"
    served = [name for name in zoo.FAMILIES if name not in REFUSED and name not in absent]
    assert len(zoo.FAMILIES) == 81
    assert len(served) == EXPECTED.get(zoo.RELEASE, max(EXPECTED.values())), (len(served), absent)


def _assert_equal_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for key in a:
        assert torch.equal(a[key], b[key]), key


def assert_same_files(a, b):
    """Two checkpoint directories: the same file names, keys, shapes, dtypes and bytes, and the same JSON."""
    names = sorted(path.name for path in a.iterdir())
    assert sorted(path.name for path in b.iterdir()) == names
    for file in names:
        if not file.endswith(".safetensors"):
            assert (a / file).read_bytes() == (b / file).read_bytes(), file
            continue
        with safe_open(a / file, "pt") as left, safe_open(b / file, "pt") as right:
            assert sorted(left.keys()) == sorted(right.keys())
            for key in left.keys():
                one, two = left.get_tensor(key), right.get_tensor(key)
                assert one.dtype == two.dtype and torch.equal(one.view(torch.uint8), two.view(torch.uint8)), key
