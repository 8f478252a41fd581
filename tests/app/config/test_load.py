"""Configs: what is accepted, what is refused with which message, and that the only exception is a ConfigError."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from app.config.load import (
    RunConfig,
    config_differences,
    config_names,
    from_plain,
    load_config,
    parse_config,
    to_plain,
    to_yaml,
)
from app.errors import ConfigError


def keys_of(content: dict[str, Any], prefix: str = "") -> list[str]:
    """Every key and section, as ``section.key``."""
    found = []
    for key, value in content.items():
        found += [prefix + key, *(keys_of(value, f"{prefix}{key}.") if isinstance(value, dict) else [])]
    return found


KEYS = keys_of(to_plain(RunConfig()))
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


def under(key: str, value: object) -> dict[str, Any]:
    """``value`` below the sections of a key."""
    for part in reversed(key.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        parse_config(text, "here.yaml", overrides)
    return str(refused.value)


def verdict(text: str, *overrides: str) -> str:
    """Why a config is refused, or nothing where it is read; any other exception goes through."""
    try:
        assert isinstance(parse_config(text, "here.yaml", overrides), RunConfig)
    except ConfigError as error:
        return str(error) or "no reason"
    return ""


def test_a_laptop_and_each_network_have_a_config() -> None:
    assert {"laptop", "unet", "resunet", "resunet-znorm", "large"} <= set(config_names())


@pytest.mark.parametrize("name", config_names())
def test_each_named_config_loads(name: str) -> None:
    assert isinstance(load_config(name), RunConfig)


@pytest.mark.parametrize("name", config_names())
def test_a_config_survives_the_round_trip_through_yaml(name: str) -> None:
    config = load_config(name)
    assert parse_config(to_yaml(config), "written") == config


@pytest.mark.parametrize("name", config_names())
def test_a_config_survives_the_round_trip_through_plain_data(name: str) -> None:
    config = load_config(name)
    assert from_plain(to_plain(config), "plain") == config


def test_the_yaml_of_a_config_holds_every_key() -> None:
    assert sorted(keys_of(yaml.safe_load(to_yaml(RunConfig())))) == sorted(KEYS)


@given(st.sampled_from(KEYS), VALUES)
@example("runtime.device", "\ud800")
@settings(max_examples=200, derandomize=True, deadline=None)
def test_any_value_under_any_key_is_read_or_refused_with_a_config_error(key: str, value: object) -> None:
    text = verdict(yaml.safe_dump({"training": {"steps": 1}} | under(key, value)))
    assert text == "" or text.startswith("here.yaml: ")


@pytest.mark.slow
@given(st.sampled_from(KEYS), VALUES)
@settings(max_examples=10000, derandomize=True, deadline=None)
def test_many_more_values_are_read_or_refused_with_a_config_error(key: str, value: object) -> None:
    text = verdict(yaml.safe_dump({"training": {"steps": 1}} | under(key, value)))
    assert text == "" or text.startswith("here.yaml: ")


@pytest.mark.parametrize("key", ["training.steps", "training.hours", "training.seed", "data.spacing_mm"])
def test_an_absurdly_large_number_is_refused_with_its_key(key: str) -> None:
    assert key in refusal("training: {hours: 1}", f"{key}={10**400}")


@given(st.text(max_size=40))
@settings(max_examples=1000, derandomize=True, deadline=None)
def test_any_text_is_read_or_refused_with_a_config_error(text: str) -> None:
    reason = verdict(text)
    assert reason == "" or reason.startswith("here.yaml: ")


@given(st.sampled_from(KEYS), st.text(max_size=20))
@settings(max_examples=1000, derandomize=True, deadline=None)
def test_any_override_is_read_or_refused_with_a_config_error(key: str, value: str) -> None:
    reason = verdict("training: {steps: 1}", f"{key}={value}")
    assert reason == "" or reason.startswith(("here.yaml: ", "--set "))


def test_an_empty_file_means_the_defaults() -> None:
    assert parse_config("", "empty.yaml") == RunConfig()


def test_a_mistyped_key_is_refused_with_a_suggestion() -> None:
    text = refusal("training: {steps: 1, learning_rat: 0.1}")
    assert text == "here.yaml: unknown key training.learning_rat; did you mean training.learning_rate?"


def test_an_unknown_key_is_refused_with_the_valid_keys_of_its_section() -> None:
    assert "unknown key data.zzz; allowed here: nan_to_zero, spacing_mm" in refusal("data: {zzz: 1}")
    assert "the budget is training.hours" in refusal("training: {minutes: 5}")


def test_an_unknown_section_is_refused_with_a_suggestion() -> None:
    assert "unknown key trainings; did you mean training?" in refusal("trainings: {steps: 1}")


def test_every_mistake_is_reported_at_once() -> None:
    text = refusal("training: {steps: x, seed: y}\nnetwork: {dropout: z}")
    assert [line.split(": ")[1] for line in text.splitlines()] == [
        "network.dropout",
        "training.steps",
        "training.seed",
    ]


@pytest.mark.parametrize("value", ['"64"', "true", "1.5", "[1]", '{"a": 1}'])
def test_a_value_that_is_not_a_whole_number_is_refused_with_key_and_value(value: str) -> None:
    text = refusal(f"training: {{steps: {value}}}")
    assert text.startswith("here.yaml: training.steps: ")
    assert text.endswith(f", got {value}")


@pytest.mark.parametrize("value", ['"0.1"', "true", ".nan", ".inf", "[0.1]"])
def test_a_non_finite_number_is_refused(value: str) -> None:
    assert refusal(f"training: {{steps: 1, learning_rate: {value}}}")


def test_a_wrong_list_entry_is_named_by_its_index() -> None:
    assert refusal('training: {steps: 1, patch_voxels: [64, "64", 64]}').startswith(
        "here.yaml: training.patch_voxels.1: "
    )


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "0.001", "+1e-3", ".1e-2"])
def test_every_notation_of_a_thousandth_is_a_number_in_files_and_overrides(text: str) -> None:
    in_file = parse_config(f"training: {{steps: 1, learning_rate: {text}}}", "here.yaml")
    assert in_file.training.learning_rate == 1e-3
    assert load_config("laptop", [f"training.learning_rate={text}"]).training.learning_rate == 1e-3


def test_an_override_beats_the_file_and_the_last_override_beats_the_first() -> None:
    config = parse_config("training: {steps: 1, seed: 2}", "here", ["training.seed=3", "training.seed=4"])
    assert config.training.seed == 4


def test_an_override_may_name_a_section_that_the_file_leaves_out() -> None:
    config = parse_config("training: {steps: 1}", "here", ["gradient.znorm.eps=0.5"])
    assert config.gradient.znorm.eps == 0.5


@pytest.mark.parametrize(("one", "other"), [("steps", "hours"), ("hours", "steps")])
def test_overriding_one_budget_clears_the_other(one: str, other: str) -> None:
    training = parse_config(f"training: {{{other}: 5}}", "here", [f"training.{one}=7"]).training
    assert (getattr(training, one), getattr(training, other)) == (7, None)


@pytest.mark.parametrize("text", ["training: {steps: 5, hours: 1}", "training: {seed: 1}"])
def test_both_budgets_or_neither_are_refused(text: str) -> None:
    assert "training.steps, training.hours: set exactly one of them" in refusal(text)


def test_a_patch_that_does_not_fit_the_network_is_refused_with_key_value_and_divisor() -> None:
    text = refusal("training: {steps: 1, patch_voxels: [64, 60, 64]}\nnetwork: {channels: [4, 8, 16, 32]}")
    assert "training.patch_voxels: [64, 60, 64]" in text
    assert "every side must be a multiple of 8" in text


@pytest.mark.parametrize(
    "override",
    [
        "training.steps=0",
        "training.batch_size=0",
        "training.learning_rate=-1",
        "training.warmup=1",
        "training.patch_voxels=[4, 4, 4]",
        "network.channels=[8]",
        "network.dropout=1",
        "gradient.clip_norm=0",
        "gradient.znorm.eps=-1",
        "data.spacing_mm=0",
        "augment.flip_probability=1.5",
        "inference.overlap=1",
        "runtime.device=gpu",
        "runtime.precision=float64",
        "training.ema_decay=1",
        "training.ema_decay=-0.1",
        "training.patience=0",
        "training.enhancing_probability=1.5",
        "runtime.loader_threads=0",
        "runtime.gpu_cases_gb=-1",
    ],
)
def test_a_value_out_of_range_is_refused_with_its_key(override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0].replace(".", r"\.")):
        load_config("laptop", [override])


@pytest.mark.parametrize("text", ["[1, 2]", "5", "words", "true"])
def test_a_file_that_is_not_a_mapping_is_refused(text: str) -> None:
    assert "a config is a mapping of sections, this is a " in refusal(text)


@pytest.mark.parametrize("text", ["{", "a: b: c", "\t- x", "training: !!python/object:os.system {}", "a: 2020-99-99"])
def test_a_file_that_is_not_plain_yaml_is_refused(text: str) -> None:
    assert refusal(text).startswith("here.yaml: not valid YAML")


@pytest.mark.parametrize("text", ["data: {}\ndata: {}", "training: {steps: 1, steps: 2}"])
def test_a_duplicate_key_is_refused(text: str) -> None:
    assert "twice" in refusal(text)


def test_an_alias_is_refused_because_aliases_can_exhaust_memory() -> None:
    bomb = "\n".join(
        [
            "a: &a [1, 1]",
            *(f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)),
        ]
    )
    assert "aliases are not supported, found *a; write out the value" in refusal(bomb)


def test_a_date_is_refused() -> None:
    assert "a value other than a number, text, list or mapping" in refusal("training: {steps: 2020-01-01}")


def test_a_config_that_does_not_exist_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        load_config(str(tmp_path / "nowhere.yaml"))


def test_an_unknown_config_name_is_refused_with_the_valid_names() -> None:
    with pytest.raises(ConfigError, match=r"'desktop' is neither a named one .*laptop"):
        load_config("desktop")


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match=r"binary\.yaml: cannot be read"):
        load_config(str(tmp_path / "binary.yaml"))


@pytest.mark.parametrize("override", ["training.steps", "=5", "training.=5", ".steps=5", ""])
def test_an_override_without_key_or_value_is_refused_with_the_expected_form(override: str) -> None:
    assert f"--set {override}: expected section.key=value" in refusal("training: {steps: 1}", override)


def test_an_override_below_a_value_is_refused() -> None:
    assert "steps is a value, not a section" in refusal("training: {steps: 1}", "training.steps.more=5")


def test_differences_list_key_old_and_new_value() -> None:
    old, new = load_config("laptop"), load_config("laptop", ["training.seed=3"])
    assert config_differences(old, new) == ["training.seed: 0 -> 3"]
    assert config_differences(old, old) == []
