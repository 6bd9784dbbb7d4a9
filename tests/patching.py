"""Settings with which tiny models gaze at their small images."""

from __future__ import annotations

from gazepatch.config import GazeConfig

SMALL = GazeConfig(region=(3, 3, 1), window=None, budget=0.25, min_visual_tokens=0)
