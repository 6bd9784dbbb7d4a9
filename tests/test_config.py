"""`GazeConfig`: what each setting takes and refuses, and that it comes back from JSON as it went."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from gazepatch.config import GazeConfig, budget_text
from gazepatch.errors import ConfigError, GazeError

NAN, INF = float("nan"), float("inf")

TAKEN: list[tuple[str, Any]] = [
    ("region", (1, 1, 1)),
    ("region", (6, 3, 4)),
    ("window", None),
    ("window", (6, 6, 1)),
    ("window", (1, 2, 1)),
    ("budget", 1),
    ("budget", 1000),
    ("budget", 1.0),
    ("budget", 1e-3),
    ("context_tokens", 0),
    ("context_tokens", 4),
    ("periphery", False),
    ("periphery", True),
    ("head_reduce", "mean"),
    ("head_reduce", "max"),
    ("head_reduce", "none"),
    ("dense_layers", ()),
    ("dense_layers", (3, 0)),
    ("prefill", "dense"),
    ("prefill", "gaze"),
    ("min_visual_tokens", 0),
    ("min_visual_tokens", 1 << 20),
    ("backend", "auto"),
    ("backend", "torch"),
]

REFUSED: list[tuple[str, Any]] = [
    ("region", None),
    ("region", 6),
    ("region", "661"),
    ("region", (6, 6)),
    ("region", (6, 6, 1, 1)),
    ("region", (6, 6, 0)),
    ("region", (6, -6, 1)),
    ("region", (6.0, 6, 1)),
    ("region", (6, 6, True)),
    ("region", ("6", 6, 1)),
    ("region", {6, 3, 1}),
    ("window", 3),
    ("window", (3, 3)),
    ("window", (0, 3, 1)),
    ("window", (3, 3.0, 1)),
    ("window", (False, 3, 1)),
    ("window", (4, 3, 1)),
    ("window", (3, 4, 1)),
    ("window", (3, 3, 2)),
    ("window", (12, 6, 1)),
    ("budget", 0),
    ("budget", -1),
    ("budget", 0.0),
    ("budget", -0.5),
    ("budget", 1.0000001),
    ("budget", 2.0),
    ("budget", NAN),
    ("budget", INF),
    ("budget", True),
    ("budget", False),
    ("budget", "0.1"),
    ("budget", None),
    ("budget", [0.1]),
    ("context_tokens", -1),
    ("context_tokens", 4.0),
    ("context_tokens", True),
    ("context_tokens", None),
    ("context_tokens", "4"),
    ("periphery", 1),
    ("periphery", 0),
    ("periphery", None),
    ("periphery", "true"),
    ("head_reduce", None),
    ("head_reduce", "Mean"),
    ("head_reduce", "sum"),
    ("head_reduce", ["mean"]),
    ("dense_layers", None),
    ("dense_layers", 0),
    ("dense_layers", (-1,)),
    ("dense_layers", (0, 1, 0)),
    ("dense_layers", (0.0,)),
    ("dense_layers", (True,)),
    ("dense_layers", ("0",)),
    ("dense_layers", {0}),
    ("dense_layers", range(2)),
    ("prefill", None),
    ("prefill", True),
    ("prefill", "sparse"),
    ("min_visual_tokens", -1),
    ("min_visual_tokens", 256.0),
    ("min_visual_tokens", False),
    ("min_visual_tokens", None),
    ("backend", None),
    ("backend", "cuda"),
]

CONFIGS = {
    "defaults": GazeConfig(),
    "paper": GazeConfig.paper(),
    "everything else": GazeConfig(
        region=(4, 8, 2),
        window=(2, 2, 1),
        budget=7,
        context_tokens=3,
        periphery=False,
        head_reduce="none",
        dense_layers=(5, 0),
        prefill="gaze",
        min_visual_tokens=1,
        backend="torch",
    ),
}


def named(case: tuple[str, Any]) -> str:
    return f"{case[0]}={case[1]!r}"


def test_both_tables_hold_every_setting() -> None:
    settings = {field.name for field in dataclasses.fields(GazeConfig)}
    assert {name for name, _ in TAKEN} == {name for name, _ in REFUSED} == settings


def through_json(config: GazeConfig) -> GazeConfig:
    return GazeConfig.from_dict(json.loads(json.dumps(config.to_dict())))


@pytest.mark.parametrize("case", TAKEN, ids=named)
def test_takes(case: tuple[str, Any]) -> None:
    name, value = case
    # Without a window, any region will do.
    config = GazeConfig(**{"window": None, name: value})
    assert getattr(config, name) == value
    assert through_json(config) == config


@pytest.mark.parametrize("case", REFUSED, ids=named)
def test_refuses(case: tuple[str, Any]) -> None:
    name, value = case
    with pytest.raises(ConfigError, match=rf"^{name} must .*got") as raised:
        GazeConfig(**{name: value})
    assert isinstance(raised.value, GazeError) and isinstance(raised.value, ValueError)


def test_region_must_be_a_multiple_of_the_default_window() -> None:
    with pytest.raises(ConfigError, match=r"window must divide region.*\(3, 3, 1\) in region \(4, 6, 1\)"):
        GazeConfig(region=(4, 6, 1))


def test_lists_become_tuples() -> None:
    config = GazeConfig(region=[6, 6, 1], window=[3, 3, 1], dense_layers=[1, 2])  # type: ignore[arg-type]
    assert config == GazeConfig(dense_layers=(1, 2))
    assert hash(config) == hash(GazeConfig(dense_layers=(1, 2)))


def test_is_frozen() -> None:
    config = GazeConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.budget = 0.5  # type: ignore[misc]
    assert config == GazeConfig()


def test_defaults() -> None:
    assert GazeConfig().to_dict() == {
        "region": [6, 6, 1],
        "window": [3, 3, 1],
        "budget": 0.25,
        "context_tokens": 0,
        "periphery": True,
        "head_reduce": "mean",
        "dense_layers": [],
        "prefill": "dense",
        "min_visual_tokens": 2048,
        "backend": "auto",
    }


def test_paper() -> None:
    changed = {k: v for k, v in GazeConfig.paper().to_dict().items() if GazeConfig().to_dict()[k] != v}
    assert changed == {
        "window": None,
        "budget": 0.125,
        "context_tokens": 4,
        "periphery": False,
        "prefill": "gaze",
        "min_visual_tokens": 0,
    }


def test_paper_with_settings_of_ones_own() -> None:
    config = GazeConfig.paper(region=(5, 7, 1), budget=3)
    assert (config.region, config.budget, config.periphery) == ((5, 7, 1), 3, False)
    with pytest.raises(ConfigError, match="budget must"):
        GazeConfig.paper(budget=2.0)


def test_window_size_is_the_region_without_a_window() -> None:
    assert GazeConfig().window_size == (3, 3, 1)
    assert GazeConfig(region=(4, 5, 2), window=None).window_size == (4, 5, 2)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        # regions: 0, 1, 3, 10, 16, 100
        (1, [0, 1, 1, 1, 1, 1]),
        (7, [0, 1, 3, 7, 7, 7]),
        # 0.07 * 100 is a little more than 7, and 0.55 * 100 than 55.
        (0.07, [0, 1, 1, 1, 2, 7]),
        (0.55, [0, 1, 2, 6, 9, 55]),
        (0.1, [0, 1, 1, 1, 2, 10]),
        (0.125, [0, 1, 1, 2, 2, 13]),
        (0.3, [0, 1, 1, 3, 5, 30]),
        (0.7, [0, 1, 3, 7, 12, 70]),
        (1.0, [0, 1, 3, 10, 16, 100]),
    ],
    ids=str,
)
def test_budget_regions(budget: float | int, expected: list[int]) -> None:
    config = GazeConfig(budget=budget)
    assert [config.budget_regions(regions) for regions in (0, 1, 3, 10, 16, 100)] == expected


@pytest.mark.parametrize("budget", [1e-9, 1e-12, 5e-324], ids=str)
def test_the_smallest_share_is_one_region(budget: float) -> None:
    assert GazeConfig(budget=budget).budget_regions(5) == 1


@pytest.mark.parametrize(
    ("budget", "text"),
    [(1.0, "1.0"), (1, "1 region"), (8, "8 regions"), (0.125, "0.125"), (1 / 3, "0.3333"), (1e-6, "1e-06")],
)
def test_what_a_budget_is_called(budget: float | int, text: str) -> None:
    assert budget_text(budget) == text


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_dictionary_and_json_round_trip(config: GazeConfig) -> None:
    assert GazeConfig.from_dict(config.to_dict()) == config
    assert through_json(config) == config


@pytest.mark.parametrize("budget", [1, 1.0], ids=["number", "share"])
def test_json_keeps_apart_one_region_and_all_of_them(budget: float | int) -> None:
    came_back = through_json(GazeConfig(budget=budget)).budget
    assert type(came_back) is type(budget)


def test_dictionary_of_some_settings() -> None:
    assert GazeConfig.from_dict({}) == GazeConfig()
    assert GazeConfig.from_dict({"budget": 3}) == GazeConfig(budget=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bugdet": 0.5}, "unknown gaze setting bugdet; known: region, window, budget"),
        ({"budget": 0.5, "z": 1, "a": 2}, "unknown gaze setting a, z; known"),
        ({1: 2}, "unknown gaze setting 1; known"),
        ({"budget": "0.5"}, "budget must"),
        ([("budget", 0.5)], "must be a mapping of names to values, got list"),
        (None, "must be a mapping of names to values, got NoneType"),
    ],
    ids=["typo", "two", "not a name", "wrong value", "pairs", "nothing"],
)
def test_dictionary_refused(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GazeConfig.from_dict(settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must be a mapping of names to values, got list"),
        ('{"budget": NaN}', "budget must"),
        ('{"budget": Infinity}', "budget must"),
        ('{"budget": true}', "budget must"),
        ('{"region": [6, 6]}', "region must"),
        ('{"region": [6, 6, 1], "windows": null}', "unknown gaze setting windows"),
    ],
    ids=["list", "nan", "infinity", "boolean", "short region", "unknown"],
)
def test_json_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GazeConfig.from_dict(json.loads(text))
