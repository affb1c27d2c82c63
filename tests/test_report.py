"""What patch() reports: text, JSON and HTML."""

import json

from transformers import AutoModelForCausalLM

import hf_flash_patch as hfp
from hf_flash_patch.report import ModuleRow, Report
from tests.integration.tiny import assert_same_as_eager, padding, tiny_model, token_ids


def test_report():
    patch = hfp.patch(tiny_model(AutoModelForCausalLM, "llama"))
    text = str(patch)
    assert "LlamaForCausalLM" in text and "LLaMA-like (rope positions)" in text
    assert "2 x LlamaAttention (4/2 heads of 8): eager -> hfp" in text
    assert "float32 on cpu" in text and "64 tokens" in text
    data = patch.to_dict()
    assert json.loads(json.dumps(data)) == json.loads(json.dumps(data, default=list))
    assert data["modules"][0]["count"] == 2
    markup = patch._repr_html_()
    assert markup.count("<table>") == 2 and "LlamaAttention" in markup


def test_report_escapes_html():
    row = ModuleRow("<Attention>", 1, "", "own", "own", "a & b")
    report = Report("M", "f", "auto", "float32", "cpu", None, (row,), ("1 < 2",))
    markup = report._repr_html_()
    assert "&lt;Attention&gt;" in markup and "a &amp; b" in markup and "1 &lt; 2" in markup
    assert "own, kept" in str(report) and "no limit" in str(report)


def test_report_has_columns():
    model = tiny_model(AutoModelForCausalLM, "gpt2")
    lines = str(hfp.patch(model, max_length=256)).splitlines()
    assert any(line.startswith("learned positions  transformer.wpe") for line in lines)
    assert all(line[17:19] == "  " and line[19] != " " for line in lines)


def test_report_names_heads_that_are_too_wide_for_the_kernels():
    model = tiny_model(AutoModelForCausalLM, "llama", head_dim=320)
    mask = padding("left")
    patch = assert_same_as_eager(
        model, lambda: model(input_ids=token_ids(), attention_mask=mask).logits, mask
    )
    assert "heads of 320: more than the kernels' 256" in str(patch)
    other = hfp.patch(tiny_model(AutoModelForCausalLM, "llama"))
    assert "more than the kernels'" not in str(other)
