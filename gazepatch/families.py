"""The families of models that can gaze, and those that cannot, as a table made from what the adapters say."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass

from gazepatch.registry import adapter_for, known_types


@dataclass(frozen=True)
class Family:
    """What is known of one model type.

    Attributes:
        model_type: As in a model's configuration.
        images, videos: How they become tokens; no words where the family has none.
        regions: `2-D`, or `runs` of tokens where features have no place in the image.
        layers: Which layers gaze.
        context_tokens: `exact`, or why the family takes none.
        refused: Why it cannot gaze at all; empty where it can.
    """

    model_type: str
    images: str = ""
    videos: str = ""
    regions: str = ""
    layers: str = ""
    context_tokens: str = ""
    refused: str = ""


def families() -> list[Family]:
    """Every model type that has an adapter, by name, then every one that is refused."""
    refused: dict[str, str] = importlib.import_module("gazepatch.adapters.refused").REFUSED
    known = known_types()
    return [_supported(model_type) for model_type in known] + [
        Family(model_type, refused=why) for model_type, why in sorted(refused.items()) if model_type not in known
    ]


def _supported(model_type: str) -> Family:
    adapter = adapter_for(model_type)
    context = f"no: {adapter.no_context}" if adapter.no_context else "exact"
    regions = "2-D" if adapter.grid else "runs"
    return Family(model_type, adapter.images, adapter.videos, regions, adapter.layers, context)


def markdown(rows: Iterable[Family]) -> str:
    """Two tables for a page: one line for all families of which the same is true."""
    supported: dict[tuple[str, ...], list[str]] = {}
    refused: dict[str, list[str]] = {}
    for row in rows:
        facts = (row.images, row.videos, row.regions, row.layers, row.context_tokens)
        of_line = refused.setdefault(row.refused, []) if row.refused else supported.setdefault(facts, [])
        of_line.append(f"`{row.model_type}`")
    lines = [
        "| model types | how images become tokens | videos | regions | layers that gaze | context tokens |",
        "|---|---|---|---|---|---|",
        *(f"| {', '.join(types)} | {' | '.join(facts)} |" for facts, types in supported.items()),
        "",
        "| cannot gaze | because |",
        "|---|---|",
        *(f"| {', '.join(types)} | {why} |" for why, types in refused.items()),
    ]
    return "\n".join(line.replace("|  |", "| |") for line in lines)
