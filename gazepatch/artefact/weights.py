"""Models are loaded with all of their weights: transformers draws at random what a checkpoint lacks, and goes on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gazepatch.errors import ArtefactError, ConfigError

_NAMED = 3  # tensors that a message names, of what may be hundreds


def load_model(source: str | Path, *, revision: str | None = None, **from_pretrained_kwargs: Any) -> Any:
    """The model in a local folder or on the Hub, none of its weights random.

    Tensors that the model has no place for are left out, as transformers does.

    Args:
        source: Local folder or Hub id.
        revision: Commit, branch or tag of the model on the Hub.
        **from_pretrained_kwargs: Passed on to `AutoModelForImageTextToText.from_pretrained`. With
            `ignore_mismatched_sizes=True`, weights of other shapes may be random.

    Raises:
        ArtefactError: Weights are missing, or have other shapes than the model's configuration says.
        ConfigError: `output_loading_info` was asked for.
    """
    from transformers import AutoModelForImageTextToText

    if from_pretrained_kwargs.pop("output_loading_info", False):
        raise ConfigError(
            "output_loading_info must be left out: a model is returned alone, and one with missing weights is refused"
        )
    # Transformers' own error for wrong shapes points to a report in its log, which may be silent.
    random_allowed = from_pretrained_kwargs.pop("ignore_mismatched_sizes", False)
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        source, revision=revision, output_loading_info=True, ignore_mismatched_sizes=True, **from_pretrained_kwargs
    )
    model, report = loaded
    _refuse_missing(source, _own(model, report["missing_keys"]))
    if not random_allowed:
        _refuse_mismatched(source, report["mismatched_keys"])
    return model


def _own(model: Any, missing: Iterable[str]) -> list[str]:
    """Missing tensors that are the model's: those that a quantiser adds, such as scales, need not be stored."""
    quantised = getattr(model, "hf_quantizer", None) is not None
    return sorted(name for name in missing if not quantised or name.endswith((".weight", ".bias")))


def _refuse_missing(source: str | Path, missing: list[str]) -> None:
    if missing:
        raise ArtefactError(
            f"expected all weights of the model in {source}, which lacks {_some(missing)}: get its files again, and "
            "check that config.json is that of these weights"
        )


def _refuse_mismatched(source: str | Path, mismatched: Iterable[tuple[str, Iterable[int], Iterable[int]]]) -> None:
    if wrong := sorted(f"{name} {list(found)} in the place of {list(wanted)}" for name, found, wanted in mismatched):
        raise ArtefactError(
            f"expected the weights in {source} in the shapes of its config.json, got {_some(wrong)}: get both again, "
            "from one place"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
