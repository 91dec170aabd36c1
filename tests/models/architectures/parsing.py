"""Configurations as text, without a model behind them."""

from __future__ import annotations

from typing import Any

import pytest

from models.config import ModelConfig, ModelError
from models.fields import Fields
from models.registry import parse_config


def parsed(values: dict[str, Any]) -> ModelConfig:
    """`values` as config.json holds them."""
    return parse_config(Fields(values))


def assert_refused(values: dict[str, Any], words: str) -> None:
    """The error names the field, what is allowed and what was there."""
    with pytest.raises(ModelError, match=words):
        parsed(values)
