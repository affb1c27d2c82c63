"""Settings of every test: one thread, fixed seeds, and no GPU tests where there is no GPU."""

from __future__ import annotations

import random

import pytest
import torch

from hf_flash_patch.ops.library import extension_status

torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect, rather than skip, what needs a GPU and the compiled kernels."""
    if torch.cuda.is_available() and extension_status().loaded:
        return
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needs_gpu:
        config.hook.pytest_deselected(items=needs_gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """The same random numbers for a test however it is run."""
    random.seed(0)
    torch.manual_seed(0)
