"""The zoo has every family of the installed transformers with experts in it: nothing that a release adds is missed without a word."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import transformers
import zoo
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES, model_type_to_module_name

MODELS = Path(transformers.__file__).parent / "models"
#: Folders of transformers that a scan brings up and that have no experts, or have them from a family of the zoo.
EXCEPTIONS = {
    "bamba": "num_experts = 1 is a constant of its code: a plain MLP",
    "convbert": "a 3-D parameter: a grouped linear layer, each group with inputs of its own",
    "csm": "a 3-D parameter: a head for each codebook, chosen by position",
    "dinat": "a 3-D parameter: position biases",
    "esmfold2": "a 3-D parameter: a head for each atom of a residue, chosen by position",
    "funnel": "3-D parameters: attention's projections by head",
    "kyutai_speech_to_text": "3-D parameters: a linear layer for each codebook, chosen by position",
    "moshi": "3-D parameters: a linear layer for each codebook, chosen by position",
    "pi0": "its action expert is a second Gemma, without a router",
    "recurrent_gemma": "3-D parameters: block-diagonal gates of its recurrence",
    "vitpose": "its backbone is in the zoo, and has one expert here",
    "xlnet": "3-D parameters: attention's projections by head",
    "zamba": "3-D parameters: the state-space projections by head",
}


def folder(model_type: str) -> str:
    """The folder of transformers' models that has a configuration."""
    return CONFIG_MAPPING[model_type].__module__.split(".")[2]


IN_ZOO = {folder(family.model_type) for family in zoo.FAMILIES.values() if family.model_type in CONFIG_MAPPING}


def names_experts(text: str) -> bool:
    """Whether code (not its comments, nor what it says of itself) speaks of experts: ``use_experts_implementation``, ``num_experts``."""
    return "expert" in re.sub(r'"""(?:.|\n)*?"""|#.*', "", text).lower()


def has_weights_of_many(text: str) -> bool:
    """Whether there is a parameter with three axes, none of a length that is a constant."""
    return any(_axes(_call(text, match.start())) == 3 for match in re.finditer(r"\bParameter\(", text))


def _call(text: str, start: int) -> ast.Call:
    """The call that begins there. Parsing whole files of transformers would take half a minute."""
    end = depth = 0
    for end in range(text.index("(", start), len(text)):
        depth += (text[end] == "(") - (text[end] == ")")
        if not depth:
            break
    return ast.parse(text[start : end + 1], mode="eval").body


def _axes(parameter: ast.Call) -> int:
    made = parameter.args[0] if parameter.args else None
    if not isinstance(made, ast.Call):
        return 0
    lengths = [value for value in made.args if not isinstance(value, ast.Starred)]
    if len(lengths) == 1 and isinstance(lengths[0], (ast.Tuple, ast.List)):
        lengths = lengths[0].elts
    return 0 if any(isinstance(value, ast.Constant) for value in lengths) else len(lengths)


def found() -> dict[str, str]:
    """Folders that have experts in their modeling code, and what says so."""
    seen = {}
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        text = path.read_text()
        if path.parent.name == "auto":
            continue
        if names_experts(text):
            seen[path.parent.name] = "its modeling code names experts"
        elif has_weights_of_many(text):
            seen[path.parent.name] = "it has a 3-D parameter"
    return seen


def borrowed() -> dict[str, str]:
    """Folders without experts of their own that take a family of the zoo: as the class of their configuration, or as a model inside."""
    classes = {}
    for name in IN_ZOO:
        for path in (MODELS / name).glob("modeling_*.py"):
            classes |= dict.fromkeys(re.findall(r"^class (\w+)", path.read_text(), re.MULTILINE), name)
    seen = {}
    for table in (value for key, value in vars(modeling_auto).items() if key.endswith("MAPPING_NAMES")):
        for model_type, value in table.items():
            for cls in (value,) if isinstance(value, str) else value:
                if cls in classes and model_type in CONFIG_MAPPING_NAMES:
                    seen[model_type_to_module_name(model_type)] = f"its model is {cls}"
    types = {name for family in zoo.FAMILIES.values() for name in (family.model_type, model_type_to_module_name(family.model_type))}
    inside = re.compile(rf"[\"']({'|'.join(sorted(types))})[\"']|from \.\.({'|'.join(sorted(IN_ZOO))})[. ]")
    for path in MODELS.glob("*/configuration_*.py"):
        if path.parent.name != "auto" and (match := inside.search(path.read_text())):
            seen.setdefault(path.parent.name, f"its configuration has {match[1] or match[2]} inside")
    return seen


def test_every_family_of_transformers_with_experts_is_in_the_zoo_or_an_exception_with_a_reason():
    seen = borrowed() | found()
    missing = {name: why for name, why in seen.items() if name not in IN_ZOO and name not in EXCEPTIONS}
    assert not missing, f"give each a row in tests/zoo.py, or a reason in EXCEPTIONS: {missing}"
    assert not set(EXCEPTIONS) & IN_ZOO
    # The scan sees what it is for: had it lost its eyes, it would find nothing missing either.
    assert IN_ZOO <= set(seen), IN_ZOO - set(seen)


@pytest.mark.parametrize(
    "code, seen",
    [
        ("self.weight = nn.Parameter(torch.empty(config.n, 2 * self.inner, self.hidden))", True),
        ("self.weight = nn.Parameter(torch.empty((n, a, b), dtype=dtype), requires_grad=True)", True),
        ("self.token = nn.Parameter(torch.zeros(1, 1, hidden))", False),
        ("@use_experts_implementation\nclass Bank: ...", True),
        ('# the experts of other families\nclass Plain:\n    """Without experts."""', False),
    ],
)
def test_the_scan_knows_experts_by_name_or_by_weight(code, seen):
    assert (names_experts(code) or has_weights_of_many(code)) is seen


@pytest.mark.parametrize("name", [name for name in (*zoo.FAMILIES, *zoo.EXTRA) if zoo.RELEASE in zoo.entry(name).broken])
def test_what_is_called_broken_is_broken(name):
    with pytest.raises(Exception):  # noqa: B017: whatever a release does wrong
        zoo.check(name)
