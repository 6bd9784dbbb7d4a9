"""A tiny LLaVA that was loaded from a folder, as models with adapters are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from adapting import reloaded
from tiny import Case, tiny


@pytest.fixture
def case() -> Case:
    return tiny("llava")


@pytest.fixture
def model(case: Case, tmp_path: Path) -> Any:
    return reloaded(case.model, tmp_path / "base")
