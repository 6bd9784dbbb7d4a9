"""Tables on the devices of layers: each is made once for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Tables:
    """Tensors by name and device, with the version of the sequence that they are of."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.device], tuple[int, Any]] = {}

    def get(self, name: str, device: torch.device, version: int, make: Callable[[], Any]) -> Any:
        """The table of a name on a device; `make` makes one, anywhere, when there is none of this version."""
        held = self._held.get((name, device))
        if held is None or held[0] != version:
            held = self._held[name, device] = version, _on(make(), device)
        return held[1]

    def forget(self, *names: str) -> None:
        """Make these anew when they are asked for."""
        self._held = {key: held for key, held in self._held.items() if key[0] not in names}


def _on(table: Any, device: torch.device) -> Any:
    if isinstance(table, tuple):
        return tuple(part.to(device) for part in table)
    return None if table is None else table.to(device)
