"""A tiny LLaVA, as it is made and after its first run."""

from __future__ import annotations

import pytest
from tiny import Case, tiny

from gazepatch.verification import generate_logits


@pytest.fixture
def case() -> Case:
    return tiny("llava")


@pytest.fixture
def ran(case: Case) -> Case:
    """A case whose model has run once: at its first run transformers sets up hooks of its own."""
    generate_logits(case.model, case.inputs, 1)
    return case
