"""A Config with some fields changed; a field is spelled as its flag, stages__full__lr."""

from dataclasses import replace
from typing import Any

from training.config import Config


def changed(config: Config, **fields: Any) -> Config:
    """The Config with each field at its new value."""

    def put(part: Any, names: list[str], value: Any) -> Any:
        name, *rest = names
        if isinstance(part, dict):
            return part | {name: put(part[name], rest, value) if rest else value}
        return replace(part, **{name: put(getattr(part, name), rest, value) if rest else value})

    for field, value in fields.items():
        config = put(config, field.split("__"), value)
    return config
