"""Every field of the configuration has a description, and a config is printed with the descriptions."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from app.config.describe import documented_yaml, meanings
from app.config.load import config_names, load_config, parse_config, purpose


@pytest.mark.parametrize("name", config_names())
def test_a_config_printed_with_descriptions_reads_back_the_same(name: str) -> None:
    config = load_config(name)
    assert parse_config(documented_yaml(config), "printed") == config


def test_every_key_follows_a_comment() -> None:
    lines = documented_yaml(load_config("laptop")).splitlines()
    keys = [number for number, line in enumerate(lines) if line and not line.lstrip().startswith("#")]
    assert len(keys) > 50
    assert [lines[number] for number in keys if not lines[number - 1].lstrip().startswith("# ")] == []


def test_a_field_without_a_description_is_an_error() -> None:
    @dataclass
    class Bare:
        told: int = 0
        """Is told."""
        untold: int = 0

    with pytest.raises(ValueError, match="Bare: no documentation under untold"):
        meanings(Bare)


def test_the_description_of_a_field_is_the_text_below_it() -> None:
    @dataclass
    class One:
        edge_mm: float = 1.0
        """Length of an edge,
        in ``mm``."""

    assert meanings(One) == {"edge_mm": "Length of an edge, in mm."}


@pytest.mark.parametrize("name", config_names())
def test_every_named_config_states_its_purpose(name: str) -> None:
    assert len(purpose(name)) > 20
    assert "\n" not in purpose(name)
