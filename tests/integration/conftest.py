from pathlib import Path

import pytest
import transformers


def pytest_collection_modifyitems(items):
    """transformers' deprecations are errors in every test of this folder."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for category in ("DeprecationWarning", "FutureWarning"):
                item.add_marker(pytest.mark.filterwarnings(f"error::{category}:transformers"))


@pytest.fixture(autouse=True, scope="session")
def quiet_transformers():
    transformers.logging.set_verbosity_error()
