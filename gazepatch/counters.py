"""What a patched model has read: counters, which in decode steps do not wait for the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from gazepatch.buffers import StableBuffers, mark_static


@dataclass(frozen=True)
class LayerStats:
    """Visual KV positions of one layer, summed over decode queries and key heads."""

    visual_entries: int
    read_entries: int
    context_entries: int = 0

    @property
    def read_share(self) -> float:
        """Share of the visual entries that was read; 0 when there were none."""
        return self.read_entries / self.visual_entries if self.visual_entries else 0.0


@dataclass(frozen=True)
class Stats:
    """What the decode steps since the last prompt read.

    Attributes:
        steps: Decode steps of sequences with visual tokens.
        visual_entries: Visual KV positions there were, summed over steps, layers, rows and key heads. Where every query
            head selects for itself (`head_reduce="none"`), over query heads.
        read_entries: How many of them were read.
        context_entries: KV positions of context tokens, which are always read.
        layers: The same for every layer that gazes, by index.
    """

    steps: int
    visual_entries: int
    read_entries: int
    context_entries: int
    layers: dict[int, LayerStats]

    @property
    def read_share(self) -> float:
        """Share of the visual entries that was read; 0 when there were none."""
        return self.read_entries / self.visual_entries if self.visual_entries else 0.0


@dataclass
class PromptReads:
    """What queries of prompts read that gaze: see `gazepatch.patch.prompt_reads`.

    Attributes:
        tokens: `[B, S]` the tokens whose queries count.
        visual: Visual KV positions that these queries see, summed as in `Stats`; 0 when none of them gazed.
        read: How many of them were read.
    """

    tokens: Tensor
    visual: int = 0
    read: int = 0

    @property
    def share(self) -> float | None:
        """Share of the visual entries that was read; None when no query gazed."""
        return self.read / self.visual if self.visual else None


class QueryReads(NamedTuple):
    """Some queries of one layer, `counted` `[B, Q]` of which are counted in `reads`."""

    reads: PromptReads
    counted: Tensor

    def part(self, part: slice) -> QueryReads:
        """Some of them."""
        return QueryReads(self.reads, self.counted[:, part])

    def add(self, taken: Tensor, seen: Tensor, length: Tensor) -> None:
        """Count what they read. Waits for the device, as selections of prompts do.

        Args:
            taken: `[B, H_kv, Q, g, R]` whether a selection reads a region.
            seen: `[B or 1, Q, R]` whether a query sees it.
            length: `[B or 1, R]` its tokens.
        """
        entries = self.counted[..., None] * seen * length[:, None]
        self.reads.visual += taken.shape[1] * taken.shape[3] * int(entries.sum())
        self.reads.read += int((taken * entries[:, None, :, None]).sum())


@dataclass
class Counters:
    """Counts of one cache since its last prompt. Reads of uneven regions stay on the device until asked for."""

    steps: int = 0
    visual: dict[int, int] = field(default_factory=dict)
    read: dict[int, int | Tensor] = field(default_factory=dict)
    context: dict[int, int] = field(default_factory=dict)

    def clear(self) -> None:
        """A new prompt starts."""
        self.steps = 0
        self.visual.clear()
        self.read.clear()
        self.context.clear()

    def add(self, layer: int, visual: int, read: int | Tensor, context: int) -> None:
        """One layer's reads in one decode step."""
        self.context[layer] = self.context.get(layer, 0) + context
        self.visual[layer] = self.visual.get(layer, 0) + visual
        if isinstance(read, Tensor) or read:
            self.read[layer] = self.read.get(layer, 0) + read

    def on_device(self, layer: int, device: torch.device) -> Tensor:
        """A layer's reads so far, `[1]` int64, for a kernel that adds its own."""
        held = self.read.get(layer, 0)
        if not isinstance(held, Tensor):
            held = self.read[layer] = torch.full((1,), held, dtype=torch.int64, device=device)
        return held

    def stats(self) -> Stats:
        """The counts so far."""
        layers = {i: LayerStats(self.visual[i], int(self.read.get(i, 0)), self.context[i]) for i in sorted(self.visual)}
        return Stats(
            steps=self.steps,
            visual_entries=sum(layer.visual_entries for layer in layers.values()),
            read_entries=sum(layer.read_entries for layer in layers.values()),
            context_entries=sum(layer.context_entries for layer in layers.values()),
            layers=layers,
        )


@dataclass
class StepCounters(Counters):
    """Counts of steps that the device may run by itself: what is the same in every step is multiplied out when asked.

    Attributes:
        ran: `[1]` steps that are not in the counts yet.
        each: What a layer counts in every step. Reads that depend on what is selected are 0 here, and in `read`.
        buffers: Of the numbers on a device.
    """

    ran: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    each: dict[int, LayerStats] = field(default_factory=dict)
    buffers: StableBuffers = field(default_factory=StableBuffers)

    def clear(self) -> None:
        """A new prompt starts."""
        super().clear()
        self._none_ran()
        self.each.clear()

    def expect(self, layer: int, visual: int, read: int | None, context: int, device: torch.device) -> None:
        """What a layer will count in every step; `read` is None where that depends on what is selected."""
        self.each[layer] = LayerStats(visual, read or 0, context)
        self.ran = mark_static(self.ran.to(device))
        if read is None:
            self.on_device(layer, device)

    def on_device(self, layer: int, device: torch.device) -> Tensor:
        """See `Counters.on_device`; it lies where it lay before the last prompt."""
        if not isinstance(held := self.read.get(layer), Tensor):
            held = self.read[layer] = self.buffers.keep(layer, super().on_device(layer, device))
        return held

    def step(self) -> None:
        """A step starts."""
        self.ran.add_(1)

    def add_read(self, layer: int, read: int | Tensor) -> None:
        """What a layer read in a step; only what was not known before counts."""
        if isinstance(read, Tensor):
            self.on_device(layer, read.device).add_(read)

    def fold(self) -> None:
        """Bring the counts up to date. Waits for the device."""
        if (ran := int(self.ran)) == 0:
            return
        self._none_ran()
        self.steps += ran
        for layer, each in self.each.items():
            self.add(layer, ran * each.visual_entries, ran * each.read_entries, ran * each.context_entries)

    def _none_ran(self) -> None:
        with torch.inference_mode():  # which alone may write to memory that was taken in it, and to any other
            self.ran.zero_()

    def stats(self) -> Stats:
        """The counts so far."""
        self.fold()
        return super().stats()
