"""Settings of the tests of context extension."""

import gc
import importlib

import pytest
import transformers


@pytest.fixture(autouse=True, scope="session")
def few_living_objects():
    """An extension looks at all living objects; what is imported is set aside: 0.1 s a look."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    importlib.import_module("transformers.generation.utils")
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
