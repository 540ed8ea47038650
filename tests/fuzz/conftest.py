"""The model that is fuzzed, and the cluster that serves it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import checkpoints
from tests.fuzz.victim import NUM_TOKENS, PROMPT, Cluster

# Refuses what the user does not begin, as the templates of some models do.
CHAT_TEMPLATE = """
{%- if messages[0]['role'] != 'user' %}{{ raise_exception('the user speaks first') }}{% endif %}
{%- for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor -%}
"""


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = checkpoints.build("smollm2", tmp_path_factory.mktemp("model"))
    checkpoints.add_tokenizer(folder, CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="package")
def expected(folder: Path) -> list[int]:
    """What the model says to `PROMPT`, as transformers computes it."""
    return checkpoints.greedy(checkpoints.oracle(folder), PROMPT, NUM_TOKENS)


@pytest.fixture(scope="package")
def cluster(folder: Path, expected: list[int]) -> Iterator[Cluster]:
    """Shared by the tests: each has to leave it as it was."""
    running = Cluster(folder, expected, "--max-model-len", "48")
    yield running
    running.stop()
