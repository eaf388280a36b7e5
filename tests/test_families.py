"""The behaviour suite: every MoE family of transformers, patched against unpatched."""

from __future__ import annotations

import compare
import pytest
import torch
import transformers
import zoo
from facts import facts
from packaging.version import Version
from safetensors import safe_open

import moepatch

OLD = Version(transformers.__version__) < Version("5.23")
#: Families whose experts are not in few large parameters: refused in words (a later version stacks lists of modules).
REFUSED = {
    "doge": "no matcher takes a mixture of this form",
    "nllb_moe": "separate modules",
    "switch_transformers": "separate modules",
    "vitpose_backbone": "separate modules",
}
SERVED = [name for name in (*zoo.FAMILIES, *zoo.EXTRA) if name not in REFUSED]
#: Families that transformers itself cannot run in bf16.
NO_BF16 = {"deepseek_v4": "transformers 5.17 feeds fp32 norms into bf16 linears"} if OLD else {}
#: How many of the 73 families must be patched and run forward and backward.
EXPECTED = 60 if OLD else 69


def runnable(name: str) -> None:
    """Skips, with the reason, what this version of transformers does not have. `test_no_family_is_missing` counts what is left."""
    why = zoo.available(name)
    if why is not None:
        pytest.skip(why)


@pytest.mark.parametrize("name", SERVED)
def test_fp32_outputs_and_gradients_are_those_of_the_unpatched_model(name, family_results):
    runnable(name)
    model = zoo.build(name)
    with compare.implementation(model, "eager"):
        outputs, grads = compare.step(name, model)
    moepatch.optimize(model)
    patched_outputs, patched_grads = compare.step(name, model)

    for key, truth in outputs.items():
        assert compare.error(patched_outputs[key], truth) <= 1e-5, key
    found = {key: compare.error(patched_grads[key], truth) for key, truth in grads.items()}
    if max(found.values()) > 1e-5:
        # Some gradients are sums that cancel: they move by more than that when the experts' results move by a rounding error.
        moepatch.restore(model)
        noise = _rounding_noise(name, model, grads)
        assert all(error <= max(1e-5, 1.5 * noise[key]) for key, error in found.items()), (found, noise)
        moepatch.optimize(model)
    patterns = moepatch.report(model).plan.patterns
    extras = [word for word in ("post-norm", "input-scaled", "identity") if word in patterns[0].site.spec.describe()]
    layouts = "; ".join([*dict.fromkeys(p.name for p in patterns), *extras])
    family_results(name, fp32=max(found.values()), layout=layouts, activation=patterns[0].site.spec.to_dict().get("activation", ""))


def _rounding_noise(name, model, grads):
    """How far each gradient of the unpatched model moves between equally good ways to compute its experts."""
    moved = []
    for own in ("grouped_mm", "batched_mm"):
        with compare.implementation(model, own):
            moved.append(compare.step(name, model)[1])
    for seed in range(6):
        with compare.implementation(model, "eager"), compare.rounding_noise(model, seed):
            moved.append(compare.step(name, model)[1])
    return {key: max(compare.error(m[key], truth) for m in moved) for key, truth in grads.items()}


@pytest.mark.parametrize("name", SERVED)
def test_bf16_error_against_fp32_is_at_most_half_again_that_of_transformers(name, family_results):
    runnable(name)
    if name in NO_BF16:
        pytest.skip(NO_BF16[name])
    found = _bf16_errors(name, seed=0)
    if max(found.values()) > 1.5:
        # Some routers have thresholds whose side is a matter of rounding. A loss of precision would show for every seed.
        found = max((_bf16_errors(name, seed) for seed in (1, 2)), key=lambda errors: max(errors.values()))
    assert max(found.values()) <= 1.5, found
    family_results(name, bf16=max(found.values()))


def _bf16_errors(name, seed):
    """Our error against fp32 divided by that of transformers, for the outputs and two groups of gradients."""
    truth_model, model = zoo.build(name, seed=seed), zoo.build(name, dtype=torch.bfloat16, seed=seed)
    with compare.PinnedRouting(truth_model) as pins:
        truth = compare.step(name, truth_model)
    with compare.PinnedRouting(model, pins):
        theirs = compare.step(name, model)
        moepatch.optimize(model)
        ours = compare.step(name, model)
    experts = set(zoo.expert_parameters(model))
    groups = {
        "outputs": [outputs for outputs, _ in (ours, theirs, truth)],
        "expert gradients": [{k: g for k, g in grads.items() if k in experts} for _, grads in (ours, theirs, truth)],
        "other gradients": [{k: g for k, g in grads.items() if k not in experts} for _, grads in (ours, theirs, truth)],
    }
    return {what: compare.together(a, c) / max(compare.together(b, c), 1e-5) for what, (a, b, c) in groups.items()}


@pytest.mark.parametrize("name", SERVED)
def test_save_reload_restore_are_bit_equal(name, tmp_path, family_results):
    runnable(name)
    source = zoo.build(name)
    cls = type(source)
    source.save_pretrained(tmp_path / "source")
    layouts = {"hub": {}, "fused": {"save_original_format": False}}
    for layout, options in layouts.items():
        source.save_pretrained(tmp_path / f"{layout}-source", **options)
        model = cls.from_pretrained(tmp_path / f"{layout}-source")
        before = facts(model)
        model.save_pretrained(tmp_path / f"{layout}-vanilla")
        moepatch.optimize(model)
        assert list(model.state_dict()) == [key for key, *_ in before["state"]]
        model.save_pretrained(tmp_path / f"{layout}-patched")
        assert_same_files(tmp_path / f"{layout}-vanilla", tmp_path / f"{layout}-patched")
        reloaded = cls.from_pretrained(tmp_path / f"{layout}-patched")
        assert {type(m) for m in reloaded.modules()} == {type(m) for m in source.modules()}
        _assert_equal_state(reloaded, cls.from_pretrained(tmp_path / f"{layout}-vanilla"))
        moepatch.restore(model)
        assert facts(model) == before
    family_results(name, saved=True)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_families_that_are_not_served_are_refused_in_words(name, family_results):
    runnable(name)
    model = zoo.build(name)
    before = facts(model)
    with pytest.raises(moepatch.NothingMatched, match=REFUSED[name]):
        moepatch.optimize(model)
    assert facts(model) == before
    family_results(name, refused=REFUSED[name])


def test_no_family_is_missing():
    """Every family is patched, or refused by name above, or absent from this version with a reason; and their number is known."""
    absent = {name: zoo.available(name) for name in zoo.FAMILIES if zoo.available(name) is not None}
    assert all(absent.values()), "a family without a reason"
    served = [name for name in zoo.FAMILIES if name not in REFUSED and name not in absent]
    assert len(zoo.FAMILIES) == 73
    assert len(served) == EXPECTED, (len(served), absent)


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
