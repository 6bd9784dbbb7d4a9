"""Gaze attention for the vision-language models you already run.

Nothing heavy is imported until a name is used: `import gazepatch` costs neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gazepatch.artefact.loading import load as load
    from gazepatch.artefact.making import convert as convert
    from gazepatch.artefact.making import save as save
    from gazepatch.artefact.pushing import Push as Push
    from gazepatch.artefact.pushing import push as push
    from gazepatch.bench import Timing as Timing
    from gazepatch.bench import bench as bench
    from gazepatch.config import GazeConfig as GazeConfig
    from gazepatch.context import initial_context_tokens as initial_context_tokens
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
    from gazepatch.stats import Stats as Stats
    from gazepatch.trace import Trace as Trace
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
    "Stats": "stats",
    "Timing": "bench",
    "Trace": "trace",
    "TrainConfig": "training.settings",
    "TrainingError": "errors",
    "UnsupportedModelError": "errors",
    "Verification": "verification",
    "apply": "patch",
    "bench": "bench",
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


class _Package(ModuleType):
    """Importing the submodule `stats` would set it as an attribute of the package, in the place of the function."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
