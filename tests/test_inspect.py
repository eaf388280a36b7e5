"""`moepatch inspect` and its views: golden output, exit codes, every way a checkpoint can be broken. No weights, no network."""

from __future__ import annotations

import doctest
import io
import json
import re
import socket
import struct
import subprocess
import sys
import textwrap
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import transformers
import zoo
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, PreTrainedConfig, Qwen3MoeConfig
from typer.testing import CliRunner

import moepatch
from moepatch import CheckpointError, MoePatchError, PlanMismatch, cli
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
DENSE = {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
INDEX = "model.safetensors.index.json"
KEYS = {
    "schema_version", "model_class", "model_type", "source", "patched", "patterns", "refusals", "estimate", "weights", "backends",
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


def test_golden_text(folder):
    text = str(moepatch.inspect(folder()))
    assert text.split("\nbackends")[0] == textwrap.dedent("""\
        Qwen3MoeForCausalLM  276.51 K params, 110.62 K active  3 layers
          bfloat16 540.1 KiB
        experts  3 × Qwen3MoeExperts  fused 3-D  E=8 K=2 H=64 I=48 swiglu
          221.18 K (80 %)

        pattern             count  now          planned     why, or why not
        experts: fused 3-D      3  grouped_mm   torch       ok

        modules
          model.layers.{0…2}.mlp.experts
        """)
    assert re.search(r"reference +experts", text) and "a loop over the experts" in text
    assert re.search(r"deep_ep +dispatch", text)
    assert text.endswith("result  every mixture of experts can be patched")


def test_golden_json(folder):
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
            }
        ],
    }
    (pattern,) = data["patterns"]
    assert pattern["fqns"] == [f"model.layers.{i}.mlp.experts" for i in range(3)]
    assert {"dispatch", "experts", "parallel_linear", "library"} == {row["table"] for row in data["backends"]}
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
    assert config.dtype is None  # what was passed in is not changed


@pytest.mark.parametrize("name", ["qwen3_moe", "ernie4_5_vl_moe", "jetmoe", "longcat_flash", "llama4", "gpt_oss", "switch_transformers"])
def test_no_line_is_wider_than_the_terminal(name, monkeypatch):
    inspection = moepatch.inspect(zoo.config(name))
    for width in (60, 80, 120, 200):
        monkeypatch.setenv("COLUMNS", str(width))
        assert widths(inspection) <= width
        assert widths(inspection.plan) <= width
        assert "\x1b" not in str(inspection)


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


def test_html_is_balanced_escaped_and_without_scripts(folder):
    class Balanced(HTMLParser):
        stack: list[str] = []

        def handle_starttag(self, tag, attrs):
            self.stack += [tag] if tag != "br" else []

        def handle_endtag(self, tag):
            assert self.stack.pop() == tag

    inspection = moepatch.inspect(folder({**TINY, "quantization_config": {"quant_method": "<b>mine</b>"}}))
    report = moepatch.report(moepatch.optimize(zoo.build("qwen3_moe", dtype=torch.bfloat16)))
    for html in (inspection._repr_html_(), report._repr_html_()):
        parser = Balanced()
        parser.feed(html)
        parser.close()
        assert parser.stack == []
        assert "<script" not in html and "<details" in html
        assert "model.layers.{0" in html and "model.layers.1.mlp.experts" in html
    assert "<b>mine" not in inspection._repr_html_() and "&lt;b&gt;mine" in inspection._repr_html_()


def test_report_prints_the_verification(qwen3):
    report = moepatch.report(moepatch.optimize(qwen3))
    text = str(report)
    assert text.startswith("Qwen3MoeForCausalLM  2 modules patched\n")
    assert "model.layers.{0,1}.mlp.experts" in text
    (row,) = [line for line in text.splitlines() if "(of " in line]
    assert row.startswith("experts: fused 3-D  torch") and row.endswith("1.0e-05  ok")
    assert "seconds  plan" in text and widths(text) <= 80


@pytest.mark.parametrize(
    ("fqns", "short"),
    [
        (["a"], ["a"]),
        (["layers.3.x"], ["layers.3.x"]),
        ([f"layers.{i}.x" for i in (0, 1, 2, 4, 7, 8)], ["layers.{0…2,4,7,8}.x"]),
        ([f"layers.{i}.x" for i in range(0, 40, 2)], ["layers.{0,2,4,6,8,10,…,38}.x"]),
        (["l.0.e.0", "l.0.e.1", "l.1.e.0"], ["l.{0,1}.e.0", "l.0.e.1"]),
        (["enc.0.x", "dec.0.x", "enc.1.x", "dec.1.x"], ["enc.{0,1}.x", "dec.{0,1}.x"]),
    ],
)
def test_collapsed_names(fqns, short):
    assert words.collapse(fqns) == short


def test_doctests_of_the_words():
    assert doctest.testmod(words).failed == 0


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


def test_exit_code_3_for_a_dense_model(folder):
    result = run("inspect", folder(DENSE))
    assert result.exit_code == 3
    assert result.stdout.startswith("BertModel") and "all active" in result.stdout
    assert "nothing here that moepatch can patch" in result.stdout


def test_a_wrong_command_line_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["moepatch", "inspect"])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 1
    assert "Missing argument" in capsys.readouterr().err


def test_a_real_process(folder):
    files = {"model.safetensors": header({"w": ("BF16", 64)})}
    done = subprocess.run(
        [sys.executable, "-m", "moepatch", "inspect", folder(files=files), "--json"], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0 and done.stderr == ""
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
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), Path(cli.__file__).parent], check=True, timeout=60, stdout=subprocess.PIPE)


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
    assert "every mixture of experts is patched" in str(after) and widths(after) <= 80


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
    assert inspection.exit_code == 3 and inspection.estimate.active_params is None
    assert "active unknown" in str(inspection) and "K=?" in str(inspection)
