"""Gaze attention for the vision-language models you already run.

Nothing heavy is imported until a name is used: `import gazepatch` costs neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gazepatch.artefact.loading import load as load
    from gazepatch.artefact.making import convert as convert
    from gazepatch.artefact.making import save as save
    from gazepatch.artefact.pushing import Push as Push
    from gazepatch.artefact.pushing import push as push
    from gazepatch.config import GazeConfig as GazeConfig
    from gazepatch.context import initial_context_tokens as initial_context_tokens
    from gazepatch.counters import Stats as Stats
    from gazepatch.errors import ArtefactError as ArtefactError
    from gazepatch.errors import CacheError as CacheError
    from gazepatch.errors import ConfigError as ConfigError
    from gazepatch.errors import GazeError as GazeError
    from gazepatch.errors import HubError as HubError
    from gazepatch.errors import PatchError as PatchError
    from gazepatch.errors import TrainingError as TrainingError
    from gazepatch.errors import UnsupportedModelError as UnsupportedModelError
    from gazepatch.evaluation import Score as Score
    from gazepatch.evaluation import evaluate as evaluate
    from gazepatch.inspection import Inspection as Inspection
    from gazepatch.inspection import inspect as inspect
    from gazepatch.patch import apply as apply
    from gazepatch.patch import context_tokens_of as context_tokens_of
    from gazepatch.patch import dense as dense
    from gazepatch.patch import is_patched as is_patched
    from gazepatch.patch import patched as patched
    from gazepatch.patch import restore as restore
    from gazepatch.patch import set_budget as set_budget
    from gazepatch.patch import stats as stats
    from gazepatch.patch import trace as trace
    from gazepatch.timing import Timing as Timing
    from gazepatch.timing import bench as bench
    from gazepatch.tracing import Trace as Trace
    from gazepatch.training.run import train as train
    from gazepatch.training.settings import TrainConfig as TrainConfig
    from gazepatch.verification import Check as Check
    from gazepatch.verification import Verification as Verification
    from gazepatch.verification import verify as verify

    __version__: str

_MODULE_OF = {
    "ArtefactError": "errors",
    "CacheError": "errors",
    "Check": "verification",
    "ConfigError": "errors",
    "GazeConfig": "config",
    "GazeError": "errors",
    "HubError": "errors",
    "Inspection": "inspection",
    "PatchError": "errors",
    "Push": "artefact.pushing",
    "Score": "evaluation",
    "Stats": "counters",
    "Timing": "timing",
    "Trace": "tracing",
    "TrainConfig": "training.settings",
    "TrainingError": "errors",
    "UnsupportedModelError": "errors",
    "Verification": "verification",
    "apply": "patch",
    "bench": "timing",
    "context_tokens_of": "patch",
    "convert": "artefact.making",
    "dense": "patch",
    "evaluate": "evaluation",
    "initial_context_tokens": "context",
    "inspect": "inspection",
    "is_patched": "patch",
    "load": "artefact.loading",
    "patched": "patch",
    "push": "artefact.pushing",
    "restore": "patch",
    "save": "artefact.making",
    "set_budget": "patch",
    "stats": "patch",
    "trace": "patch",
    "train": "training.run",
    "verify": "verification",
}

__all__ = [*_MODULE_OF, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


if not TYPE_CHECKING:  # with it, a type checker believes every name, misspelt ones too

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            return version("gazepatch")
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'gazepatch' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"gazepatch.{_MODULE_OF[name]}"), name)
        globals()[name] = value  # found directly from now on
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
