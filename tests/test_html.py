"""Reports and inspections in notebooks: HTML that is balanced, escaped, without scripts, and says what the text says."""

from __future__ import annotations

from html.parser import HTMLParser

import torch
import zoo
from transformers import LlamaConfig, LlamaForCausalLM

import moepatch


class Page(HTMLParser):
    """Checks that tags are balanced and keeps the rows of tables as lists of texts."""

    def __init__(self, html: str):
        super().__init__()
        self.stack: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.stack += [tag] if tag != "br" else []
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if "td" in self.stack or "th" in self.stack:
            self.rows[-1][-1] += data


def test_balanced_escaped_and_without_scripts():
    config = zoo.config("qwen3_moe")
    config.quantization_config = {"quant_method": "<b>mine</b>"}
    inspection = moepatch.inspect(config)
    report = moepatch.report(moepatch.optimize(zoo.build("qwen3_moe", dtype=torch.bfloat16)))
    for html in (inspection._repr_html_(), report._repr_html_()):
        Page(html)
        assert "<script" not in html and "<details" in html
        assert "model.layers.{0" in html and "model.layers.1.mlp.experts" in html
    assert "<b>mine" not in inspection._repr_html_() and "&lt;b&gt;mine" in inspection._repr_html_()


def test_the_experts_are_above_the_dense_half(qwen3):
    plan = moepatch.report(moepatch.optimize(qwen3)).plan
    rows = Page(moepatch.report(qwen3)._repr_html_()).rows
    titles = [row[0] for row in rows if len(row) == 1]
    assert titles == ["Mixture of experts", "Dense half"]
    first, second = (rows.index([title]) for title in titles)
    assert second - first - 1 == len(plan.mixture) == 1 and rows[first + 1][0].startswith("experts: fused 3-D")
    dense = rows[second + 1 : second + len(plan.patterns)]
    assert [row[3] for row in dense] == [p.backend for p in plan.patterns if p not in plan.mixture]
    assert all(len(row) == 5 and row[0].startswith(p.name) for row, p in zip(dense, plan.patterns[1:], strict=True))


def test_a_model_without_experts():
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(config)
    html = moepatch.inspect(model)._repr_html_()
    assert [row for row in Page(html).rows if len(row) == 1] == [["Dense half"]]
    assert "the dense half can be patched; there is no mixture of experts in it" in html
    html = moepatch.report(moepatch.optimize(model))._repr_html_()
    assert [row for row in Page(html).rows if len(row) == 1] == [["Dense half"]]
    assert "<li>" in html and "there is no mixture of experts in this model" in html


def test_nothing_to_patch():
    html = moepatch.inspect(torch.nn.Linear(2, 2))._repr_html_()
    assert not [row for row in Page(html).rows if len(row) in (1, 5)] and "nothing here that moepatch can patch" in html
