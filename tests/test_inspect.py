"""`moepatch inspect` and its views: golden output, exit codes, every way a checkpoint can be broken. No weights, no network."""

from __future__ import annotations

import io
import json
import re
import socket
import struct
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
import zoo
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, LlamaConfig, PreTrainedConfig, Qwen3MoeConfig
from typer.testing import CliRunner

import moepatch
from moepatch import CheckpointError, MoePatchError, PlanMismatch, cli, registry
from moepatch.estimate import top_k
from moepatch.registry import register_matcher, unregister
from moepatch.render import terminal, words
from moepatch.site import Refusal

TINY = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 80,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "torch_dtype": "bfloat16",
}
#: The smallest of transformers' models in which there is nothing for moepatch.
NOTHING = {"model_type": "resnet", "architectures": ["ResNetModel"], "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
LLAMA = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
#: Backends that need something installed, except Triton's.
MORE = {"cce", "cudnn", "deep_ep", "fa4", "fla", "liger", "quack", "symm_mem", "te"}
INDEX = "model.safetensors.index.json"
KEYS = {
    "schema_version", "model_class", "model_type", "source", "patched", "patterns", "refusals", "left", "share", "estimate", "weights", "backends",
    "warnings", "exit_code",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("inspect must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(autouse=True)
def columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.fixture
def folder(tmp_path):
    """``folder(config, **files)``: a directory with a config.json (a dict, or text) and other files (bytes, text or JSON)."""

    def make(config: object = TINY, files: dict[str, object] | None = None) -> Path:
        for name, content in {"config.json": config, **(files or {})}.items():
            if isinstance(content, bytes):
                (tmp_path / name).write_bytes(content)
            else:
                (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path

    return make


@pytest.fixture
def bare_machine(monkeypatch):
    """Whatever is installed here: a machine with torch and nothing else, on which moepatch knows of Triton."""
    whole = registry.backends

    def bare(table):
        kept = [b for b in whole(table) if b.name not in MORE]
        return [replace(b, why_not=lambda *args: "not installed (pip install triton)") if b.name == "triton" else b for b in kept]

    monkeypatch.setattr(registry, "backends", bare)


def header(tensors: dict[str, tuple[str, int]], data: bool = False) -> bytes:
    """A safetensors file of ``{name: (dtype, bytes)}``: the header alone, or with zeros for data."""
    entries, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, count) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": [count], "data_offsets": [end, end + count]}
        end += count
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end if data else 0)


def run(*args: object):
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


def widths(text: object) -> int:
    return max(len(line) for line in str(text).splitlines())


# ------------------------------------------------------------------------------------------------------- what it prints


def test_golden_text(folder, bare_machine):
    text = str(moepatch.inspect(folder()))
    assert text.split("\nbackends")[0] == textwrap.dedent("""\
        Qwen3MoeForCausalLM  276.51 K params, 110.62 K active  3 layers
          bfloat16 540.1 KiB
        experts  3 × Qwen3MoeExperts  fused 3-D  E=8 K=2 H=64 I=48 swiglu
          221.18 K (80 %)  keeps 2 MiB a layer of 4,096 tokens
        share   100 % of a step's FLOPs and 32 of 32 modules with weights would be
                patched

        mixture of experts   count  now               planned     why, or why not
        experts: fused 3-D       3  grouped_mm        torch       fallback; not
                                                                  installed: triton

        dense half
        attention function:      1  sdpa              torch       ok
        plain
        residual: pre-norm       3  own forward       reference   fallback; not
                                                                  installed: triton
        attention: q, k, v       3  own forward       reference   fallback; not
        apart                                                     installed: triton
        norm: RMS norm           6  own forward       reference   fallback; not
                                                                  installed: triton
        router: softmax          3  own forward       reference   fallback; not
                                                                  installed: triton
        norm: RMS norm           7  own forward       reference   fallback; not
                                                                  installed: triton
        loss: head               1  logits in memory  chunked     ok

        modules
          experts: fused 3-D  E=8 H=64 I=48 swiglu  model.layers.{0…2}.mlp.experts
          attention function: plain  3 x 4/2 heads D=16 causal  model
          residual: pre-norm
            H=64 h + self_attn(input_layernorm(h)), h + mlp(post_attention_layernorm(h))
            model.layers.{0…2}
          attention: q, k, v apart  H=64 heads=4/2×16, norm head, rope half
            model.layers.{0…2}.self_attn
          norm: RMS norm  RMS 16 eps=1e-06 cast before
            model.layers.{0…2}.self_attn.q_norm  model.layers.{0…2}.self_attn.k_norm
          router: softmax  8 experts H=64 top-2 softmax  model.layers.{0…2}.mlp.gate
          norm: RMS norm  RMS 64 eps=1e-06 cast before
            model.layers.{0…2}.input_layernorm
            model.layers.{0…2}.post_attention_layernorm  model.norm
          loss: head  cross-entropy of 64 → 128  lm_head
        """)
    assert re.search(r"\nexperts +torch, reference +\S.*installed: triton", text) and re.search(r"\nnorm +reference +not installed: triton\n", text)
    assert re.search(r"\ndispatch +all_to_all, local\n", text)
    assert not re.search(r"\n(ssd|delta|parallel_linear) ", text)  # tables that this model has nothing for
    assert text.endswith("result  every mixture of experts can be patched, and the dense half")


def test_golden_text_of_a_dense_model(bare_machine):
    text = str(moepatch.inspect(LLAMA))
    assert text.startswith("LlamaForCausalLM  22.69 K params, all active  2 layers  bfloat16 44.3 KiB\nshare   100 % of a step's FLOPs and ")
    assert "\n\ndense half " in text and "\nmixture of experts" not in text and not re.search("\n(experts|dispatch) ", text)
    assert re.search(r"\nmlp: gate and up +2 +own forward +torch +fallback; not\n", text) and re.search(r"\nnorm: RMS norm +5 ", text)
    assert text.endswith("result  the dense half can be patched; there is no mixture of experts in it")


def test_golden_json(folder, bare_machine):
    result = run("inspect", folder(), "--json")
    assert result.exit_code == 0 and result.stderr == ""
    data = json.loads(result.stdout)
    assert set(data) == KEYS
    assert data["schema_version"] == 1 and data["model_type"] == "qwen3_moe" and data["weights"] is None
    assert data["estimate"] == {
        "total_params": 276512,
        "expert_params": 3 * 8 * 3 * 64 * 48,
        "active_params": 276512 - 221184 * 6 // 8,
        "bytes": 553024,
        "bytes_by_dtype": {"bfloat16": 553024},
        "layers": 3,
        "experts": [
            {
                "class": "Qwen3MoeExperts",
                "count": 3,
                "layout": "fused 3-D",
                "num_experts": 8,
                "top_k": [2],
                "params": 221184,
                "served": True,
                "kept_per_token": 2 * (2 * 48 * 2 + 16),
            }
        ],
    }
    experts, *dense = data["patterns"]
    assert experts["fqns"] == [f"model.layers.{i}.mlp.experts" for i in range(3)]
    counts = [("attention_function", 1), ("residual", 3), ("attention_block", 3), ("norm", 6), ("router", 3), ("norm", 7), ("loss", 1)]
    assert [(pattern["kind"], pattern["count"]) for pattern in dense] == counts
    norm = dense[3]
    assert norm["choices"] == {"triton": "not installed (pip install triton)", "reference": "available"}
    assert norm["why"] == "fallback; triton: not installed (pip install triton)"  # whole, where the table has it short
    assert {"dispatch", "experts", "norm", "attention", "ssd"} <= {row["table"] for row in data["backends"]}
    for row in data["backends"]:
        assert row["available"] == (row["why_not"] is None)


def test_numbers_of_a_known_model():
    config = Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
    )  # fmt: skip
    inspection = moepatch.inspect(config)
    assert inspection.estimate.total_params == 30_532_122_624
    assert inspection.estimate.expert_params == 28_991_029_248
    parts = words.model_parts(inspection)
    assert parts == ["Qwen3MoeForCausalLM", "30.53 B params, 3.35 B active", "48 layers", "bfloat16 56.9 GiB"]
    (group,) = inspection.estimate.groups
    assert words.expert_sizes(group) == "E=128 K=8 H=2048 I=768 swiglu"
    assert words.kept(group) == "96 MiB a layer of 4,096 tokens"
    assert config.dtype is None  # what was passed in is not changed


def test_colours_only_on_a_terminal(folder, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    view = terminal.view_of_inspection(moepatch.inspect(folder()))
    outputs = {}
    for name, stream, no_color in (("plain", io.StringIO(), ""), ("tty", Terminal(), ""), ("no_color", Terminal(), "1")):
        monkeypatch.setenv("NO_COLOR", no_color)
        terminal.print_view(view, stream)
        outputs[name] = stream.getvalue()
    assert "\x1b[" in outputs["tty"]
    assert "\x1b" not in outputs["plain"] and outputs["plain"] == outputs["no_color"]


# ---------------------------------------------------------------------------------------------------------- exit codes


def test_exit_code_0(folder):
    result = run("inspect", folder() / "config.json")
    assert result.exit_code == 0 and result.stdout.startswith("Qwen3MoeForCausalLM") and result.stderr == ""


def test_exit_code_1_names_the_problem_on_stderr(tmp_path):
    result = run("inspect", tmp_path / "nothing", "--json")
    assert result.exit_code == 1 and result.stdout == ""
    assert "no such file or directory" in result.stderr and "Traceback" not in result.stderr


def test_exit_code_2_if_some_experts_are_refused(folder):
    @register_matcher("test_refusal", priority=1000)
    def refuse(found, scan, memo):
        if found.fqn == "model.layers.1.mlp.experts":
            return Refusal(fqns=found.fqns, class_name="Qwen3MoeExperts", reason="the test says so", hint="Do not run the test.")
        return None

    try:
        result = run("inspect", folder())
    finally:
        unregister("test_refusal")
    assert result.exit_code == 2
    assert "model.layers.{0,2}.mlp.experts" in result.stdout
    assert "model.layers.1.mlp.experts\n    Qwen3MoeExperts: the test says so.\n    Do not run the test." in result.stdout


def test_exit_code_0_for_a_dense_model(folder):
    result = run("inspect", folder(LLAMA.to_dict()))
    assert result.exit_code == 0 and "there is no mixture of experts in it" in result.stdout


def test_exit_code_3_if_the_dense_half_is_served_and_none_of_the_experts_is():
    inspection = moepatch.inspect(zoo.config("switch_transformers"))
    assert inspection.exit_code == 3 and not inspection.plan.mixture
    text = str(inspection)
    assert "\nleft alone\n" in text and "\ndense half " in text
    assert text.endswith("result  the dense half can be patched, the mixture of experts is left alone")


def test_exit_code_3_if_there_is_nothing_to_patch(folder):
    result = run("inspect", folder(NOTHING))
    assert result.exit_code == 3
    assert result.stdout.startswith("ResNetModel") and "all active" in result.stdout
    assert "nothing here that moepatch can patch" in result.stdout
    assert re.search(r"\nexperts +torch, ", result.stdout)  # what this machine has, if the model asks for nothing


def test_a_wrong_command_line_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["moepatch", "inspect"])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 1
    assert "Missing argument" in capsys.readouterr().err


def test_a_real_process(folder):
    files = {"model.safetensors": header({"w": ("BF16", 64)})}
    done = subprocess.run(
        [sys.executable, "-m", "moepatch", "inspect", folder(files=files), "--json"], capture_output=True, text=True, timeout=1500
    )
    said = [line for line in done.stderr.splitlines() if not line.startswith("moepatch: ") or not line.endswith(" …")]
    assert done.returncode == 0 and said == []  # a slow machine is told what takes long
    assert json.loads(done.stdout)["weights"]["tensors"] == 1


def test_the_command_line_itself_imports_nothing_heavy():
    code = """
        import pathlib, sys, types
        package = types.ModuleType("moepatch")
        package.__path__ = [sys.argv[1]]
        sys.modules["moepatch"] = package
        from moepatch.cli import app
        try:
            app(["--help"])
        except SystemExit:
            pass
        assert not {"torch", "transformers"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), Path(cli.__file__).parent], check=True, timeout=1500, stdout=subprocess.PIPE)


def test_version():
    assert run("--version").stdout == f"moepatch {moepatch.__version__}\n"


def test_doctor():
    text = run("doctor")
    assert text.exit_code == 0
    assert f"transformers  {transformers.__version__}" in text.stdout and re.search(r"reference +experts", text.stdout)
    assert widths(text.stdout) <= 80
    data = json.loads(run("doctor", "--json").stdout)
    assert set(data) == {"schema_version", "versions", "backends"}
    assert {"moepatch", "python", "torch", "transformers", "cuda"} <= set(data["versions"])
    assert {row["name"] for row in data["backends"]} >= {"reference", "torch", "quack", "te", "liger", "deep_ep"}


# ------------------------------------------------------------------------------------------------- what it can be given


def test_module_and_configuration_agree():
    config = zoo.config("qwen3_moe")
    loaded, dry = moepatch.inspect(zoo.build("qwen3_moe", dtype=torch.bfloat16)), moepatch.inspect(config)
    assert loaded.estimate == dry.estimate
    assert loaded.source == "a loaded model" and loaded.exit_code == dry.exit_code == 0


def test_patched_module(qwen3):
    before = moepatch.inspect(qwen3)
    moepatch.optimize(qwen3)
    after = moepatch.inspect(qwen3)
    assert after.patched and after.exit_code == 0 and after.plan is moepatch.report(qwen3).plan
    assert after.estimate == before.estimate and after.model_class == before.model_class
    assert str(after).endswith("every mixture of experts is patched, and so is the dense half") and widths(after) <= 80


def test_module_patched_without_its_dense_half(qwen3):
    after = moepatch.inspect(moepatch.optimize(qwen3, dense=False))
    assert after.exit_code == 0 and str(after).endswith("every mixture of experts is patched")
    assert str(after).count(" left alone  dense=False") == len(after.plan.patterns) - 1


def test_patched_model_inside_another(qwen3):
    inspection = moepatch.inspect(nn.ModuleDict({"inner": moepatch.optimize(qwen3)}))
    assert any("'inner' inside it is patched" in warning for warning in inspection.warnings)


def test_partly_matched_module(qwen3):
    qwen3.extra = nn.Module()
    qwen3.extra.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
    inspection = moepatch.inspect(qwen3)
    assert inspection.exit_code == 2
    (refused,) = [group for group in inspection.estimate.groups if not group.served]
    assert (refused.class_name, refused.num_experts, refused.top_k, refused.params) == ("ModuleList", 4, (2,), 80)
    assert "some is left alone" in str(inspection) and "extra.experts" in str(inspection) and widths(inspection) <= 80


def test_what_optimize_would_refuse_is_a_warning(qwen3):
    qwen3.model.embed_tokens.weight = nn.Parameter(torch.zeros(128, 64, dtype=torch.int8), requires_grad=False)
    assert any("cannot be trained" in warning for warning in moepatch.inspect(qwen3).warnings)


def test_pathlike_and_str(folder):
    assert moepatch.inspect(str(folder())).to_dict() == moepatch.inspect(folder()).to_dict()


@pytest.mark.parametrize("wrong", [3, None, {"model_type": "qwen3_moe"}])
def test_anything_else_is_refused(wrong):
    with pytest.raises(MoePatchError, match=f"this is a {type(wrong).__name__}"):
        moepatch.inspect(wrong)


def test_unknown_keyword(folder):
    with pytest.raises(PlanMismatch, match="no option 'ep'. Options are: none yet"):
        moepatch.inspect(folder(), ep=8)


# -------------------------------------------------------------------------------------------------------------- weights


def test_headers_without_data(folder):
    shards = {f"model-{i}.safetensors": header({f"a{i}": ("BF16", 4096), f"b{i}": ("F32", 64)}) for i in (1, 2)}
    index = {"weight_map": {f"a{i}": f"model-{i}.safetensors" for i in (1, 2)}}
    inspection = moepatch.inspect(folder(files={**shards, INDEX: index}))
    assert inspection.weights.tensors == 4
    assert inspection.weights.bytes_by_dtype == {"bfloat16": 8192, "float32": 128}
    assert inspection.weights.short == tuple(shards)
    assert any("2 of 2 files end before their data" in warning for warning in inspection.warnings)
    assert "2 safetensors files, 4 tensors" in inspection.source


def test_whole_files(folder):
    path = folder({k: v for k, v in TINY.items() if k != "torch_dtype"})
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(2, dtype=torch.int64)}, path / "model.safetensors")
    inspection = moepatch.inspect(path)
    assert inspection.weights.short == () and inspection.weights.bytes_by_dtype == {"float32": 60, "int64": 16}
    assert any("the files hold float32; the sizes here are those of bfloat16" in warning for warning in inspection.warnings)


def test_no_weights_is_noted(folder):
    assert moepatch.inspect(folder()).source.endswith("no weights")
    assert "pytorch_model.bin" in moepatch.inspect(folder(files={"pytorch_model.bin": b""})).source


def test_missing_shards_are_named(folder):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-3.safetensors"}}
    with pytest.raises(CheckpointError, match=r"2 of 3 shards named by .* are missing: model-2.safetensors, model-3.safetensors"):
        moepatch.inspect(folder(files={INDEX: index, "model-1.safetensors": header({})}))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model.safetensors": b""}, "model.safetensors: its header is not that of a safetensors file"),
        ({"model.safetensors": b"version https://git-lfs.github.com/spec/v1\n"}, "bytes long"),
        ({"model.safetensors": header({"a": ("F32", 4)})[:20]}, "bytes long"),
        ({"model.safetensors": struct.pack("<Q", 4) + b"nope"}, "JSONDecodeError"),
        ({"model.safetensors": struct.pack("<Q", 8) + b'{"a": 1}'}, "its header is not that"),
        ({INDEX: "{"}, "index.json: it cannot be read as JSON"),
        ({INDEX: {"weight_map": 3}}, "it has no weight_map"),
    ],
)
def test_broken_weight_files(folder, files, message):
    result = run("inspect", folder(files=files))
    assert result.exit_code == 1 and "Traceback" not in result.stderr
    assert message in result.stderr


# ------------------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"model_type": "qwen3_moe", ', "config.json: it cannot be read as JSON: JSONDecodeError"),
        (b"\xff\xfe\x00", "it cannot be read as JSON: UnicodeDecodeError"),
        ("", "it cannot be read as JSON"),
        ([1, 2], "it holds a JSON list"),
        ({"hidden_size": 8}, "it has no model_type"),
        ({**TINY, "model_type": "qwen3_mo"}, "does not know the model type 'qwen3_mo'. Did you mean 'qwen3_moe'?"),
        ({**TINY, "model_type": "brand_new", "auto_map": {"AutoConfig": "x.Y"}}, "call moepatch.inspect(model)"),
        ({**TINY, "hidden_size": "wide"}, "Qwen3MoeConfig refuses it"),
        ({**TINY, "hidden_act": "none_such"}, "Qwen3MoeForCausalLM refuses it: KeyError"),
        ({**TINY, "num_attention_heads": 0, "head_dim": None}, "refuses it"),
        ({**TINY, "torch_dtype": "bfloat17"}, "refuses it"),
    ],
)
def test_broken_configurations(folder, config, message):
    result = run("inspect", folder(config))
    assert result.exit_code == 1 and result.stdout == ""
    assert message in result.stderr and "config.json" in result.stderr and "Traceback" not in result.stderr


def test_directory_without_configuration(tmp_path):
    with pytest.raises(CheckpointError, match="has no config.json"):
        moepatch.inspect(tmp_path)


def test_configuration_that_transformers_has_no_model_for():
    class OwnConfig(PreTrainedConfig):
        model_type = "own"

    with pytest.raises(CheckpointError, match="has no model for OwnConfig. Load the model and call"):
        moepatch.inspect(OwnConfig())


def test_short_configuration_is_warned_of(folder):
    inspection = moepatch.inspect(folder({"model_type": "qwen3_moe"}))
    assert inspection.warnings == ("the configuration gives no sizes: these are the defaults of its class",)


def test_quantized_configuration(folder):
    (warning,) = moepatch.inspect(folder({**TINY, "quantization_config": {"quant_method": "fp8"}})).warnings
    assert "quantized (fp8): training needs dequantized weights" in warning


def test_code_of_a_known_family_is_not_run(folder):
    path = folder({**TINY, "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}, {"evil.py": "raise SystemExit(9)"})
    (warning,) = moepatch.inspect(path).warnings
    assert "was not run" in warning


@pytest.mark.parametrize(
    ("config", "class_name"),
    [
        ({k: v for k, v in TINY.items() if k != "architectures"}, "Qwen3MoeForCausalLM"),
        ({**TINY, "architectures": ["Qwen3MoeModel"]}, "Qwen3MoeModel"),
        ({**TINY, "architectures": ["Qwen3MoeForFun"]}, "Qwen3MoeForCausalLM"),
        (zoo.config("qwen3_vl_moe"), "Qwen3VLMoeForConditionalGeneration"),
        (zoo.config("llama4"), "Llama4ForConditionalGeneration"),
        (zoo.config("switch_transformers"), "SwitchTransformersForConditionalGeneration"),
        (BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, architectures=["BertModel"]), "BertModel"),
    ],
)
def test_class_of_the_model(folder, config, class_name):
    assert moepatch.inspect(folder(config) if isinstance(config, dict) else config).model_class == class_name


@pytest.mark.parametrize(("name", "dtype"), [("float32", "float32"), ("float16", "float16"), ("auto", "bfloat16"), (None, "bfloat16")])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype(folder, key, name, dtype):
    config = {k: v for k, v in TINY.items() if k != "torch_dtype"} | {key: name}
    assert list(moepatch.inspect(folder(config)).estimate.bytes_by_dtype) == [dtype]


# ------------------------------------------------------------------------------------------------------------ estimates


@pytest.mark.parametrize(
    ("config", "k"),
    [
        ({}, None),
        ({"moe_topk": [2, 4]}, (2, 4)),
        ({"text_config": {"moe_k": 6}, "vision_config": {"depth": 2}}, 6),
        ({"ffn_config": {"moe_top_k": 4}}, 4),
        ({"a": {"moe_k": 6}, "b": {"moe_k": 2}}, None),
        ({"top_k": 50, "num_experts_per_tok": None}, None),
    ],
)
def test_top_k(config, k):
    assert top_k(config) == k


def test_top_k_by_layer():
    sizes = moepatch.inspect(zoo.config("hunyuan_v1_moe", moe_topk=[1, 4])).estimate
    assert sizes.groups[0].top_k == (1, 4) and words.expert_sizes(sizes.groups[0]).startswith("E=8 K=1…4 ")
    assert sizes.active_params == sizes.total_params - sizes.expert_params + sizes.expert_params * 5 // 16


def test_tied_weights_count_once():
    untied, tied = (moepatch.inspect(zoo.config(name)).estimate for name in ("qwen3_moe", "qwen3_moe_tied"))
    assert untied.total_params - tied.total_params == zoo.VOCAB * 64


def test_unknown_top_k_is_unknown():
    inspection = moepatch.inspect(zoo.config("switch_transformers"))
    assert inspection.estimate.active_params is None
    assert "active unknown" in str(inspection) and "K=?" in str(inspection)
