"""A model's folder, but for its weights, which the coordinator never reads."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from colrow.errors import InvalidArgument
from coordinator.families import Fields, model_spec
from coordinator.model_spec import ModelSpec
from coordinator.tokenizer import Tokenizer

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
CHARACTERS_A_TOKEN = 16  # at most, in a text of many; texts have 4 or 5


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model on disk, its weights unread."""

    path: Path
    config_json: str
    spec: ModelSpec
    tokenizer: Tokenizer | None

    @classmethod
    def open(cls, path: Path) -> "ModelFolder":
        """Reads config and tokenizer; ValueError naming what is missing or not supported."""
        file = path / CONFIG_FILE
        if not file.is_file():
            raise InvalidArgument("model", str(path), f"is no folder with a {CONFIG_FILE}")
        text = file.read_text(errors="replace")
        spec = model_spec(parse_config(text, CONFIG_FILE))
        if (file := path / GENERATION_CONFIG_FILE).is_file():
            # Chat models often end their turns with a token that only this file names.
            generation = parse_config(file.read_text(errors="replace"), GENERATION_CONFIG_FILE)
            fields = Fields(generation, prefix=f"{GENERATION_CONFIG_FILE}: ")
            ids = fields.token_ids("eos_token_id", None)
            spec = replace(spec, eos_token_ids=tuple({*spec.eos_token_ids, *ids}))
        tokenizer = Tokenizer.load(path)
        if tokenizer is not None:
            long = CHARACTERS_A_TOKEN * spec.max_position_embeddings
            tokenizer.max_characters = max(tokenizer.max_characters, long)
        return cls(path.resolve(), text, spec, tokenizer)


def parse_config(text: str, field: str = "config_json") -> dict[str, Any]:
    """The object of a config.json; InvalidArgument of `field` where the text is none."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(field, text, str(error)) from error
    if not isinstance(config, dict):
        raise InvalidArgument(field, text, "is no JSON object")
    return config
