"""`GazeConfig`: every setting of a patched model, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from gazepatch.errors import ConfigError

HEAD_REDUCTIONS = ("mean", "max", "none")
PREFILLS = ("dense", "gaze")
BACKENDS = ("auto", "torch", "triton")

#: `(h, w, t)` in decoder tokens.
Size = tuple[int, int, int]

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class GazeConfig:
    """Settings of gaze attention. The defaults are for checkpoints that were never trained with it.

    Sizes are `(h, w, t)` in decoder tokens, so after any pooling or merging by the vision tower.

    Args:
        region: What is read together: a block of neighbouring visual tokens of one image, tile or video.
        window: What is scored together; `region` must be a multiple of it on every axis. `None` means the region
            itself, as in the paper. Smaller windows score finer than you read.
        budget: Regions one query may read: a share of those it can see (0 < float <= 1) or their number (int >= 1).
        context_tokens: Learned embeddings appended to each image or frame. 0 for checkpoints without trained ones.
        periphery: Whether every window of the regions that are not read takes part as one pseudo-token, with logit
            `scale * q . mean(K) + log n` and value `mean(V)`.
        head_reduce: How the query heads that share a key head agree on regions: by the `mean` or `max` of their
            scores, or `none`: each query head selects for itself. In a decoder that keeps latents (MLA) all query heads
            share them, as a single key head.
        dense_layers: Indices of decoder layers that keep the model's own attention.
        prefill: Whether the text of a prompt reads everything (`dense`) or gazes too (`gaze`, for models trained so).
        min_visual_tokens: A sequence with fewer visual tokens is read whole, because selecting would cost more time
            than it saves.
        backend: What computes the routed steps: `triton` (kernels; needs a GPU), `torch`, or `auto`: kernels on a GPU,
            torch elsewhere.

    Raises:
        ConfigError: A setting has the wrong type or value.

    Source: Gaze Attention, https://arxiv.org/abs/2605.13080; periphery as in https://arxiv.org/abs/2606.01563.
    """

    region: Size = (6, 6, 1)
    window: Size | None = (3, 3, 1)
    budget: float | int = 0.25
    context_tokens: int = 0
    periphery: bool = True
    head_reduce: str = "mean"
    dense_layers: tuple[int, ...] = ()
    prefill: str = "dense"
    min_visual_tokens: int = 2048
    backend: str = "auto"

    def __post_init__(self) -> None:
        # JSON has no tuples: lists are welcome and become tuples, so that equal settings compare equal.
        for name in ("region", "window", "dense_layers"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        _check_block("region", self.region)
        if self.window is not None:
            _check_block("window", self.window)
            if any(r % w for r, w in zip(self.region, self.window, strict=True)):
                raise ConfigError(
                    f"window must divide region on every axis (h, w, t), got window {self.window} "
                    f"in region {self.region}"
                )
        _check_budget(self.budget)
        check_int("context_tokens", self.context_tokens, minimum=0)
        check_int("min_visual_tokens", self.min_visual_tokens, minimum=0)
        if not isinstance(self.periphery, bool):
            raise ConfigError(f"periphery must be True or False, got {self.periphery!r}")
        check_choice("head_reduce", self.head_reduce, HEAD_REDUCTIONS)
        check_choice("prefill", self.prefill, PREFILLS)
        check_choice("backend", self.backend, BACKENDS)
        _check_layers(self.dense_layers)

    def changed(self, settings: Mapping[str, Any]) -> GazeConfig:
        """These settings with others in the place of some."""
        return self.from_dict({**self.to_dict(), **settings})

    @classmethod
    def paper(cls, **settings: Any) -> GazeConfig:
        """The settings of the paper, for models trained with gaze: an eighth of the regions, 4 context tokens."""
        paper: dict[str, Any] = {
            "window": None,
            "budget": 0.125,
            "context_tokens": 4,
            "periphery": False,
            "prefill": "gaze",
            "min_visual_tokens": 0,
        }
        return cls(**(paper | settings))

    @property
    def window_size(self) -> Size:
        """The window in use: `window`, or the whole region."""
        return self.region if self.window is None else self.window

    def budget_regions(self, regions: int) -> int:
        """Number of regions a query reads out of `regions` that it can see."""
        if isinstance(self.budget, int):
            return min(self.budget, regions)
        # The small step back keeps ceil(0.1 * 10) at 1 whatever the rounding of the product.
        return min(max(1, math.ceil(self.budget * regions - 1e-9)), regions)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> GazeConfig:
        """The inverse of `to_dict`. Missing keys take their defaults, unknown keys are an error."""
        if not isinstance(settings, Mapping):
            raise ConfigError(f"gaze settings must be a mapping of names to values, got {type(settings).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(map(str, settings.keys() - set(known))):
            raise ConfigError(f"unknown gaze setting {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**settings)


def budget_text(budget: float | int) -> str:
    """A budget as people read it: `0.25`, `1.0`, `1 region`, `8 regions`."""
    if isinstance(budget, int):
        return f"{budget} region{'s' * (budget != 1)}"
    return str(float(f"{budget:.4g}"))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def settings_of(given: Any, default: Settings) -> Settings:
    """What was given for settings like the `default`, which stands for None.

    Raises:
        ConfigError: It is something else.
    """
    if given is not None and not isinstance(given, wanted := type(default)):
        raise ConfigError(
            f"expected a {wanted.__name__}, got {type(given).__name__}: "
            f"{wanted.__name__}.from_dict(...) makes one of a mapping"
        )
    return default if given is None else given


def check_int(name: str, value: object, minimum: int) -> None:
    """Raise ConfigError unless a setting is an integer of at least `minimum`."""
    if not _is_int(value) or value < minimum:  # type: ignore[operator]
        raise ConfigError(f"{name} must be an integer of at least {minimum}, got {value!r}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ConfigError unless a setting is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_block(name: str, value: object) -> None:
    if not (isinstance(value, tuple) and len(value) == 3 and all(_is_int(n) and n >= 1 for n in value)):
        raise ConfigError(f"{name} must be three integers (h, w, t) of at least 1, got {value!r}")


def _check_budget(value: object) -> None:
    if _is_int(value) and value >= 1:  # type: ignore[operator]
        return
    if isinstance(value, float) and 0.0 < value <= 1.0:
        return
    raise ConfigError(
        "budget must be a share of the regions (a float, 0 < budget <= 1) or their number (an int of at least 1), "
        f"got {value!r}"
    )


def _check_layers(value: object) -> None:
    if not (isinstance(value, tuple) and all(_is_int(n) and n >= 0 for n in value) and len(set(value)) == len(value)):
        raise ConfigError(f"dense_layers must be distinct layer indices counted from 0, got {value!r}")
