"""Tests of LoRA run where there is a PEFT that is new enough."""

from __future__ import annotations

import pytest

from gazepatch.lora import missing_peft

needs_peft = pytest.mark.skipif(bool(missing_peft()), reason=f"LoRA needs {missing_peft()}")
