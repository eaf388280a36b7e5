"""bench/step.py runs end to end on a CPU, writes what it measured, and gives every stack the same work."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from torch.autograd import DeviceType

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import models
import stacks
import step
import step_profile
import step_progress
import step_scopes
from step_weights import materialise, meta_model

KEYS = {
    "stack", "status", "model", "layers", "batch", "seq", "routing", "dtype", "seed", "warmup", "repeats", "checkpointing", "tiny", "ranks", "ep",
    "options", "device", "versions", "date", "command", "params", "active_params", "gflops_per_token", "seconds",
}  # fmt: skip
#: What is known of a stack only where its process has counted.
SHAPE = {"params", "active_params", "gflops_per_token"}
MEASURED = {"forward_ms", "backward_ms", "step_ms", "tokens_per_s_per_gpu", "tflops_per_gpu", "mfu", "peak_gib", "activations_gib", "held_gib", "loss", "uses"}


def test_end_to_end(tmp_path, capsys):
    out, png = tmp_path / "rows.jsonl", tmp_path / "plot.png"
    words = ["--tiny", "--stacks", "transformers", "moepatch", "deepspeed", "--repeats", "2", "--warmup", "1", "--profile", "--optimizer"]
    step.main([*words, "--out", str(out), "--plot", str(png)])
    printed, progress = capsys.readouterr()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["stack"] for row in rows] == ["transformers", "moepatch", "deepspeed"]
    assert all(KEYS <= set(row) for row in rows)
    assert rows[2]["status"] == "skipped" and "not installed" in rows[2]["why"]
    for row in rows[:2]:
        assert row["status"] == "ok" and MEASURED <= set(row), row
        assert row["step_ms"] > 0 and row["tokens_per_s_per_gpu"] > 0 and row["optimizer_ms"] > 0
        assert (row["peak_gib"] is None) == (not torch.cuda.is_available())
        assert sum(row["waterfall_ms"].values()) > 0 and set(row["waterfall_ms"]) <= set(step_profile.CATEGORIES)
        assert {"attention", "expert GEMM", "dense GEMM"} <= set(row["waterfall_ms"])
        assert row["command"].startswith("python bench/step.py --tiny --stacks")
        assert set(row["seconds"]) == {"build", "fill", "patch", "routing", "warm-up", "timing", "profile", "optimizer"}
    assert {"plan", "apply", "verify"} <= set(rows[1]["patch_seconds"]) and "moepatch: timing " in progress
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=2e-3)
    assert "moepatch" in printed and "category" in printed and "deepspeed: skipped" in printed
    if pytest.importorskip("matplotlib", reason="the numbers were checked; plots need matplotlib"):
        assert png.stat().st_size > 5000 and png.with_name("plot-waterfall.png").stat().st_size > 5000


def test_a_stack_without_memory_has_a_place_in_the_plot(tmp_path):
    plot = pytest.importorskip("plot", reason="plots need matplotlib")
    rows = step.main(["--tiny", "--stacks", "moepatch-experts", "transformers", "--repeats", "1", "--warmup", "0"])
    rows[1] = {**rows[1], "status": "failed", "why": "OutOfMemoryError: CUDA out of memory."}
    plot.comparison(rows, tmp_path / "one.png")
    places, *_ = plot._places([plot._shape(rows[0])], ["transformers", "moepatch-experts"], {(plot._shape(r), r["stack"]) for r in rows})
    assert len(places) == 2 and (tmp_path / "one.png").stat().st_size > 5000


def test_a_stack_in_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(BENCH.parent), os.environ.get("PYTHONPATH", "")]))
    out = tmp_path / "rows.jsonl"
    words = ["--tiny", "--isolate", "--stacks", "moepatch-experts", "--repeats", "1", "--warmup", "0", "--routing", "hot", "--checkpointing", "--out", str(out)]
    (row,) = step.main(words)
    assert json.loads(out.read_text()) == row
    assert (row["stack"], row["status"], row["routing"], row["checkpointing"]) == ("moepatch-experts", "ok", "hot", True)
    assert row["command"] == " ".join(["python bench/step.py", *words])


def test_options_reach_optimize(capsys):
    (row,) = step.main(["--tiny", "--stacks", "moepatch", "--repeats", "1", "--warmup", "0", "--options", "experts=reference", "dense=false"])
    assert row["status"] == "ok" and row["options"] == ["experts=reference", "dense=false"]
    assert len([use for use in row["uses"] if "×" in use]) == 1 and row["uses"][0].endswith("): reference")


def test_a_process_that_dies_is_reported(monkeypatch):
    monkeypatch.setattr(step.sys, "executable", "/bin/false")
    (row,) = step.main(["--tiny", "--isolate", "--stacks", "transformers"])
    assert row["status"] == "failed" and "ended with 1" in row["why"]


def test_a_process_that_was_ended_is_reported(monkeypatch, tmp_path):
    class Ended:
        returncode = 1

    monkeypatch.setattr(step.subprocess, "run", lambda *args, **kwargs: time.sleep(0.1) or Ended)
    out = tmp_path / "rows.jsonl"
    (row,) = step.main(["--tiny", "--isolate", "--stacks", "transformers-v4", "--timeout", "0.05", "--out", str(out)])
    assert row["status"] == "failed" and row["why"].startswith("took longer than 0.05 s (--timeout)") and set(row) >= KEYS - SHAPE - {"seconds"}
    assert json.loads(out.read_text()) == row


@pytest.mark.parametrize("model", sorted(models.CONFIGS))
def test_every_model_as_published_and_as_a_tiny_one(model, capsys):
    whole = meta_model(models.make_config(model), torch.bfloat16)
    assert sum(p.numel() for p in whole.parameters()) == models.PARAMETERS[model]
    rows = step.main(["--tiny", "--model", model, "--stacks", "transformers", "moepatch", "--repeats", "1", "--warmup", "0", "--dtype", "float32"])
    assert [row["status"] for row in rows] == ["ok", "ok"], rows
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-3 if torch.cuda.is_available() else 1e-5)
    assert model in capsys.readouterr().out


@pytest.mark.gpu
def test_on_a_gpu_the_profiler_is_read(capsys):
    words = ["--layers", "2", "--seq", "1024", "--stacks", "transformers", "moepatch", "--repeats", "3", "--warmup", "2", "--profile", "--optimizer"]
    rows = step.main(words)
    for row in rows:
        assert row["status"] == "ok" and "profile_error" not in row, row
        assert 0 < row["gpu_busy"] <= 1 and row["launches_per_layer"] > 10 and row["syncs_per_layer"] >= 0 and row["mfu"] > 0
        assert row["peak_with_optimizer_gib"] > row["peak_gib"] > row["activations_gib"] > 0
        assert {"attention", "expert GEMM", "dense GEMM", "norms, rope"} <= set(row["waterfall_ms"])
        assert sum(row["waterfall_ms"].values()) < 1.5 * row["step_ms"]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=2e-2)
    print(capsys.readouterr().out)


def test_slices_keep_what_they_are_about():
    nano = models.make_config("Nemotron-3-Nano-30B-A3B", 13)
    kinds = list(nano.layers_block_type)
    assert len(kinds) == nano.num_hidden_layers == 13 and {"moe", "full_attention", "linear_attention"} <= set(kinds)
    assert models.make_config("DeepSeek-V3", 2).first_k_dense_replace == 0
    assert models.make_config("DeepSeek-V3").first_k_dense_replace == 3
    assert models.make_config("gpt-oss-20b", 12).layer_types == ["sliding_attention", "full_attention"] * 6


def test_flops_of_a_token():
    config = models.make_config("Qwen3-30B-A3B")
    flops = models.flops_per_token(meta_model(config, torch.bfloat16), config, 3_353_032_704, 4096)
    assert flops == pytest.approx(23.08e9, rel=1e-3)
    assert models._seen("sliding_attention", 4096, 128) == pytest.approx(126)


def test_a_stack_that_fails_is_reported_and_leaves_nothing_behind(monkeypatch, tmp_path):
    modeling = sys.modules["transformers.models.qwen3_moe.modeling_qwen3_moe"]
    rotate = modeling.rotate_half

    def broken(model, setting):
        modeling.rotate_half = None
        raise RuntimeError("broken\non purpose")

    monkeypatch.setitem(stacks.STACKS, "transformers-liger", stacks.Stack("transformers-liger", broken))
    out = tmp_path / "rows.jsonl"
    rows = step.main(["--tiny", "--stacks", "transformers-liger", "transformers", "--repeats", "1", "--warmup", "0", "--out", str(out)])
    assert [row["status"] for row in rows] == ["failed", "ok"] and rows[0]["why"] == "RuntimeError: broken on purpose"
    assert modeling.rotate_half is rotate
    assert len(out.read_text().splitlines()) == 2


def test_shards_are_filled_with_parts_of_the_same_weights():
    for own in on_ranks(2, _filled):
        assert own


def _filled() -> bool:
    sys.path.insert(0, str(BENCH))
    import models
    import stacks
    from step_weights import materialise, meta_model
    from torch.distributed.tensor import DTensor

    setting = stacks.Setting(2, 2, torch.device("cpu"))
    whole = meta_model(models.make_config("Qwen3-30B-A3B", tiny=True), torch.float32)
    materialise(whole, setting.device, 7)
    expected = dict(whole.named_parameters())
    assert all(p.abs().sum() > 0 for p in expected.values())
    for name in ("transformers", "moepatch"):
        model = stacks.STACKS[name].prepare(meta_model(models.make_config("Qwen3-30B-A3B", tiny=True), torch.float32), setting)
        materialise(model, setting.device, 7)
        for key, parameter in model.named_parameters():
            value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            assert torch.equal(value, expected[key]), (name, key)
        for key, buffer in model.named_buffers():
            assert torch.equal(buffer, whole.get_buffer(key)), (name, key)
    return True


def test_weights_depend_on_the_seed_and_the_name():
    one, same, other = _whole(0), _whole(0), _whole(1)
    assert torch.equal(one.lm_head.weight, same.lm_head.weight) and not torch.equal(one.lm_head.weight, other.lm_head.weight)
    experts = one.model.layers[0].mlp.experts.down_proj
    assert experts.std().item() == pytest.approx(0.02, rel=0.05) and not torch.equal(experts[0], experts[1])
    assert torch.equal(one.model.norm.weight, torch.ones(64))


def _whole(seed):
    model = meta_model(models.make_config("Qwen3-30B-A3B", tiny=True), torch.float32)
    materialise(model, torch.device("cpu"), seed)
    return model


@pytest.mark.parametrize(
    ("name", "scopes", "category"),
    [
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel<GemmUniversal<cutlass::gemm::GroupProblemShape<", "", "expert GEMM"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTN", "aten::mm aten::linear attention", "dense GEMM"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_6_64x128x128", "", "attention"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "", "FSDP gathers"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "", "dispatch"),
        ("_fetch_kernel", "_Dispatch experts", "dispatch"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel", "aten::silu experts", "activation"),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<8", "aten::_log_softmax aten::cross_entropy_loss", "loss"),
        ("void at::native::elementwise_kernel<128, 4, mul>", "aten::mul norm", "norms, rope"),
        ("_backward_kernel", "_RopeBackward attention", "norms, rope"),
        ("void at::native::radix_sort", "aten::sort experts", "permute"),
        ("kernel_cutlass_kernel_quackrmsnorm_backward", "_Norm", "norms, rope"),
        ("kernel_cutlass_kernel_quackgemm_sm90GemmSm90_object_at__tensorptrbf16", "_Grouped experts", "expert GEMM"),
        ("Memcpy DtoD (Device -> Device)", "aten::copy_", "elementwise, copies"),
        ("_forward_kernel", "_GroupedMLP experts", "activation"),
        ("_forward_kernel", "_Mlp", "activation"),
        ("_forward_kernel", "CausalConv mixer", "mixer"),
        ("_route_kernel", "_GroupedMLP experts", "permute"),
        ("_scale_kernel", "_ChunkedBackward", "loss"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTN", "_ChunkedBackward", "dense GEMM"),
    ],
)
def test_kernels_are_sorted_by_name_and_scope(name, scopes, category):
    tags = frozenset().union(*(step_scopes.tags_of(scope) for scope in scopes.split()))
    assert step_profile.categorise(name, tags) == category


@dataclasses.dataclass(slots=True)
class Event:
    """What the profiler gives, as far as it is read."""

    called: str
    start: int
    length: int
    key: int
    device: DeviceType = DeviceType.CPU
    linked: int = 0
    sequence: int = -1
    forward_thread: int = 0
    thread: int = 1

    def name(self) -> str:
        return self.called

    def start_ns(self) -> int:
        return self.start

    def duration_ns(self) -> int:
        return self.length

    def correlation_id(self) -> int:
        return self.key

    def device_type(self) -> DeviceType:
        return self.device

    def linked_correlation_id(self) -> int:
        return self.linked

    def sequence_nr(self) -> int:
        return self.sequence

    def fwd_thread_id(self) -> int:
        return self.forward_thread

    def start_thread_id(self) -> int:
        return self.thread

    def is_user_annotation(self) -> bool:
        return False


def test_a_kernel_of_the_backward_has_the_scopes_of_its_forward():
    gpu = {"device": DeviceType.CUDA, "thread": 0}
    events = [
        Event("experts", 0, 100, 1),
        Event("aten::mul", 10, 20, 2, sequence=5),
        Event("cudaLaunchKernel", 12, 3, 90),
        Event("elementwise_kernel", 50, 10, 91, linked=2, **gpu),
        Event("autograd::engine::evaluate_function: MulBackward0", 200, 50, 3, sequence=5, forward_thread=1, thread=2),
        Event("MulBackward0", 205, 40, 4, sequence=5, forward_thread=1, thread=2),
        Event("aten::mul", 210, 20, 5, thread=2),
        Event("elementwise_kernel", 300, 10, 92, linked=5, **gpu),
        Event("loose_kernel", 320, 10, 93, linked=0, **gpu),
        Event("cuLaunchKernelEx", 40, 3, 94),
        Event("unlinked_kernel", 340, 10, 94, linked=0, **gpu),
        Event("cuLaunchKernelEx", 150, 3, 95),
        Event("kernel_after_all", 360, 10, 95, linked=0, **gpu),
    ]
    first, second, loose, unlinked, after = step_profile.kernels(events)
    assert first.tags == second.tags == unlinked.tags == {"experts"} and loose.tags == after.tags == set()
    assert step_scopes.Scopes(events).parents == [-1, 0, -1, 2, 3]


def test_ids_that_collide_make_no_circle():
    """Overhead of the profiler has no id of its own, and its other events can have those of operators."""
    gpu = {"device": DeviceType.CUDA, "thread": 0}
    events = [
        Event("Activity Buffer Request", 0, 500, 0, thread=2**64 - 1),
        Event("Lazy Function Loading", 1, 400, 7, thread=2**64 - 1),
        Event("attention", 10, 100, 7, sequence=1),
        Event("aten::mul", 20, 10, 7, sequence=1, forward_thread=1),
        Event("aten::mul", 20, 10, 8, sequence=1, forward_thread=1),
        Event("elementwise_kernel", 50, 10, 9, linked=7, **gpu),
        Event("elementwise_kernel", 60, 10, 10, linked=0, **gpu),
        Event("Context Sync", 60, 1000, 11, linked=0, **gpu),
    ]
    first, second = step_profile.kernels(events)
    assert first.tags == {"attention"} and second.tags == set()
    scopes = step_scopes.Scopes(events)
    assert all(parent < number for number, parent in enumerate(scopes.parents)) and len(scopes.events) == 3


def test_a_large_profile_is_sorted():
    """Within the limit of any test: 200,000 operators nested 10 deep, half of them of a backward whose scopes come from the forward, and 20,000 kernels."""
    depth, stacks_of = 10, 10_000
    events = []
    for index in range(stacks_of):
        for level in range(depth):
            name = "experts" if level == 0 else f"aten::op{level % 7}"
            events.append(Event(name, 1000 * index + level, 900 - 2 * level, 1 + index * depth + level, sequence=index))
        for level in range(depth):
            key = 1 + (stacks_of + index) * depth + level
            start = 1000 * (2 * stacks_of - index) + level
            backward = {"sequence": index, "forward_thread": 1} if level < 2 else {}
            events.append(Event("MulBackward0" if level < 2 else "aten::mul", start, 900 - 2 * level, key, thread=2, **backward))
    keys = range(1, 2 * stacks_of * depth, depth)
    events += [Event("some_kernel", 10 * i, 9, 0, DeviceType.CUDA, linked=key + depth - 1, thread=0) for i, key in enumerate(keys)]
    work = step_profile.kernels(events)
    times = step_profile.category_ms(work)
    assert len(work) == 20_000 and all(w.tags == {"experts"} for w in work)
    assert times == {"permute": pytest.approx(20_000 * 9 / 1e6)}


def test_hooks_of_the_profile_are_not_on_the_modules():
    """Patched modules go around submodules that have no hooks; so what is profiled is what was timed."""
    model = torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(4), "other": torch.nn.Linear(4, 4)})
    with step_scopes.scoped(model), torch.profiler.profile() as recorded:
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        torch.nn.LayerNorm(4)(model["other"](model["norm"](torch.ones(1, 4))))
    names = [e.name() for e in recorded.profiler.kineto_results.events()]
    assert names.count("norm") == 1
    assert not torch.nn.modules.module._global_forward_pre_hooks and not torch.nn.modules.module._global_forward_hooks


def test_overlapping_work_is_counted_once_and_hidden_communication_not_at_all():
    work = [
        step_profile.Work(0, 10_000_000, "ncclDevKernel_AllGather"),
        step_profile.Work(4_000_000, 8_000_000, "nvjet_gemm"),
        step_profile.Work(5_000_000, 6_000_000, "nvjet_gemm"),
    ]
    times = step_profile.category_ms(work)
    assert times["dense GEMM"] == pytest.approx(4) and times["FSDP gathers"] == pytest.approx(6)


def test_a_stack_that_takes_too_long_is_given_up_and_the_next_goes_on(monkeypatch, tmp_path):
    def slow(model, setting):
        time.sleep(0.2)
        signal.raise_signal(signal.SIGALRM)  # the limit's own signal, as if the time were over: no clock decides
        pytest.fail("it went on")

    monkeypatch.setitem(stacks.STACKS, "transformers-liger", stacks.Stack("transformers-liger", slow))
    out = tmp_path / "rows.jsonl"
    step.main(["--tiny", "--stacks", "transformers-liger", "deepspeed", "--timeout", "5000", "--out", str(out)])
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    assert first["status"] == "failed" and "--timeout" in first["why"] and first["seconds"]["patch"] > 0.1 and second["stack"] == "deepspeed"


def test_a_profile_that_hangs_does_not_cost_the_times(monkeypatch):
    def hang(*args):
        with step_progress.limited(0.2, gently=True):
            while True:
                pass

    monkeypatch.setattr("step_measure.profiled", hang)
    monkeypatch.setattr(step_progress, "_GRACE", 5000)  # after which the process would end, which is the test's
    (row,) = step.main(["--tiny", "--stacks", "transformers", "--repeats", "1", "--warmup", "0", "--profile"])
    assert row["status"] == "ok" and row["step_ms"] > 0 and row["profile_error"].startswith("TimeoutError")


def test_a_model_that_a_stack_has_nothing_for_is_skipped(monkeypatch):
    def none(model, setting):
        raise stacks.NotServed("Liger has no patch for glm4_moe")

    monkeypatch.setitem(stacks.STACKS, "transformers-liger", stacks.Stack("transformers-liger", none))
    (row,) = step.main(["--tiny", "--model", "GLM-4.5-Air", "--stacks", "transformers-liger"])
    assert (row["status"], row["why"]) == ("skipped", "Liger has no patch for glm4_moe")
