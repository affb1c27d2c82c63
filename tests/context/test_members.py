"""Every member of the families with learned positions, on the meta device."""

import pytest
import torch
from transformers import AutoModel

import hf_flash_patch as hfp
from hf_flash_patch.families import FAMILIES
from tests.integration.tiny import tiny_config

LEARNED = [t for family in FAMILIES if family.positions == "learned" for t in family.model_types]


def _shapes(model):
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: (tensor.shape, tensor.dtype, tensor.device.type) for name, tensor in tensors}


@pytest.mark.parametrize("model_type", LEARNED)
def test_has_the_shapes_that_its_config_makes(model_type):
    with torch.device("meta"):
        model = AutoModel.from_config(tiny_config(model_type))
        before = _shapes(model)
        report = hfp.extend_context(model, 200)
        expected = AutoModel.from_config(model.config)
    assert _shapes(model) == _shapes(expected) != before
    assert report.after == 200
    sizes = {n: m.num_embeddings for n, m in model.named_modules() if hasattr(m, "num_embeddings")}
    for name, module in expected.named_modules():
        assert name not in sizes or sizes[name] == module.num_embeddings
