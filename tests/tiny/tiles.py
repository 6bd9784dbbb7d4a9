from __future__ import annotations

FAMILIES = {}
VIDEO = ()
