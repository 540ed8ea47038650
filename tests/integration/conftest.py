"""Fixtures that several integration tests share."""

import pytest

from tests.refusals import Model, build_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A small model with a tokenizer, and what it says to a prompt."""
    return build_model(tmp_path_factory.mktemp("model"))
