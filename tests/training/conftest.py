"""Settings of the training tests."""

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def imports_are_no_garbage():
    """Trainer collects garbage whenever it starts: 0.3 s, nearly all of it for imported modules."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
