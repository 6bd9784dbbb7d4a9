"""Train the small VLM from scratch: first its vision tower with throw-away probes, then projector and decoder.

Stage 2 trains dense, or with gaze and a budget that falls step by step. Runs can be stopped and started again: every
step draws its data from the seed and its own number, and a checkpoint holds the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from data import IGNORED, Batch, evaluation_set, make_batch, normalise
from memory import keep_memory
from model import PRESETS, Preset, build, make_processor, save
from muon import Muon
from packages import require
from scenes import Scene, digits, draw
from scoring import right_tokens, score
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from words import NAMES, Board

import gazepatch

Wrapper = Callable[[Batch], AbstractContextManager[Any]]

BATCH = {"cpu": 32, "full": 64}
STEPS = {"cpu": (1200, 2000), "full": (4000, 20000)}
SEVERAL = 0.3  # share of the steps with several frames
#: Questions of a sequence: to learn to find a cell, then everything.
FIRST = {"digit": 6, "colour": 6}
MIX = {"digit": 3, "colour": 2, "row": 3, "more": 4, "most": 1}
FRAMES = {"frame": 12}
#: Share of the regions that gaze reads, one after the other in equal parts of the first 60 % of the steps.
BUDGETS = (1.0, 0.75, 0.5, 0.375, 0.25, 0.1875)
FINAL_BUDGET = 0.125


class Optimisers:
    """Muon for the matrices inside layers, AdamW for everything else, with one schedule for both."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], steps: int, rate: float = 0.02) -> None:
        matrices, rest = [], []
        for name, parameter in named:
            (matrices if "layers." in name and parameter.ndim == 2 else rest).append(parameter)
        self.steps = steps
        self.parameters = matrices + rest
        self.both: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)]
        if matrices:
            self.both.append(Muon(matrices, lr=rate))
        self.peaks = [optimiser.param_groups[0]["lr"] for optimiser in self.both]

    def step(self, loss: Tensor, step: int) -> None:
        """One update; the rate rises for 50 steps and falls to zero over the last 40 %."""
        factor = min((step + 1) / 50, (self.steps - step) / (0.4 * self.steps), 1.0)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimiser, peak in zip(self.both, self.peaks, strict=True):
            optimiser.param_groups[0]["lr"] = factor * peak
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def state_dict(self) -> list[Any]:
        """State of both."""
        return [optimiser.state_dict() for optimiser in self.both]

    def load_state_dict(self, states: list[Any]) -> None:
        """The inverse of `state_dict`."""
        for optimiser, state in zip(self.both, states, strict=True):
            optimiser.load_state_dict(state)


class Run:
    """Time, log and checkpoints of a training run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.started = args, time.time()
        self.before = 0.0
        self.saved = time.time()
        self.folder = Path(args.out)
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def seconds(self) -> float:
        """Seconds of training, those before a restart included."""
        return self.before + time.time() - self.started

    def log(self, **values: Any) -> None:
        """One line of JSON to the terminal and to `log.jsonl`."""
        line = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()})
        print(line, flush=True)
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(line + "\n")

    def loop(
        self, stage: str, steps: int, state: dict[str, Any], train: Callable[[int], float], test: Callable[[], Any]
    ) -> bool:
        """Run the steps of a stage from its checkpoint on; False if time ran out first.

        Args:
            stage: Name of the checkpoint.
            steps: How many.
            state: What has `state_dict` and `load_state_dict` and belongs in the checkpoint.
            train: Does a step, returns its loss.
            test: Returns what to log.
        """
        path = self.folder / f"{stage}.pt"
        first = self._load(path, state)
        loss, since, at = 0.0, first, time.time()
        for step in range(first, steps):
            loss += train(step)
            done = step + 1
            if done % self.args.log_every == 0 or done == steps:
                pace, mean = (time.time() - at) / (done - since), loss / (done - since)
                self.log(stage=stage, step=done, loss=mean, step_seconds=pace, **test(), seconds=self.seconds)
                loss, since, at = 0.0, done, time.time()
            late = self.args.minutes is not None and time.time() - self.started > 60 * self.args.minutes
            if done == steps or late or time.time() - self.saved > 150:
                self._save(path, state, done)
            if late and done < steps:
                return False
        return True

    def _load(self, path: Path, state: dict[str, Any]) -> int:
        if not path.exists():
            return 0
        saved = torch.load(path, map_location=self.args.device, weights_only=True)
        for name, part in state.items():
            part.load_state_dict(saved[name])
        self.before = max(self.before, saved["seconds"])
        return int(saved["step"])

    def _save(self, path: Path, state: dict[str, Any], step: int) -> None:
        """Replace the checkpoint at once, so that a crash leaves the old or the new one."""
        saved = {name: part.state_dict() for name, part in state.items()}
        torch.save(saved | {"step": step, "seconds": self.seconds}, part_file := path.with_suffix(".part"))
        os.replace(part_file, path)
        self.saved = time.time()


def chance(args: argparse.Namespace, stage: int, step: int) -> tuple[torch.Generator, random.Random]:
    """Sources of chance of one step."""
    seed = (args.seed * 10 + stage) * 10_000_000 + step
    return torch.Generator(args.device).manual_seed(seed), random.Random(seed)


# ---- stage 1


def token_targets(scene: Scene, cell_tokens: int) -> dict[str, Tensor]:
    """What every visual token of `[B, 1, ...]` boards should know, each `[B, V]`."""
    digit, colour = scene.digits[:, 0], scene.colours[:, 0]
    n = digit.shape[-1]
    line = torch.arange(n, device=digit.device)
    cells = {
        "digit": digit,
        "colour": colour,
        "row": line[:, None].expand_as(digit),
        "column": line.expand_as(digit),
        "tint": scene.tints[:, 0, None, None].expand_as(digit),
    }
    return {
        name: value.repeat_interleave(cell_tokens, 1).repeat_interleave(cell_tokens, 2).flatten(1)
        for name, value in cells.items()
    }


def train_tower(run: Run, model: LlavaForConditionalGeneration, preset: Preset) -> bool:
    """Stage 1: every token learns what its cell holds, where it is, and the tint of the board."""
    args, board, tower = run.args, preset.board, model.model.vision_tower
    steps = args.tower_steps or STEPS[args.scale][0]
    sizes = {"digit": 10, "colour": len(NAMES), "row": board.cells, "column": board.cells, "tint": len(NAMES)}
    probes = nn.ModuleDict({name: nn.Linear(preset.width, size) for name, size in sizes.items()}).to(args.device)
    optimisers = Optimisers([*tower.named_parameters(), *probes.named_parameters()], steps)
    source, held_out = (part.to(args.device) for part in digits())

    def outputs(scene: Scene) -> dict[str, Tensor]:
        features = tower(normalise(scene.pixels[:, 0])).last_hidden_state[:, 1:]
        return {name: probe(features) for name, probe in probes.items()}

    def train(step: int) -> float:
        scene = draw(board, source, BATCH[args.scale], 1, chance(args, 1, step)[0])
        targets = token_targets(scene, board.cell_tokens)
        with torch.autocast(args.device, torch.bfloat16):
            found = outputs(scene)
        losses = [F.cross_entropy(out.float().flatten(0, 1), targets[name].flatten()) for name, out in found.items()]
        loss = torch.stack(losses).sum()
        optimisers.step(loss, step)
        return loss.item()

    @torch.no_grad()
    def test() -> dict[str, float]:
        scene = draw(board, held_out, 64, 1, torch.Generator(args.device).manual_seed(1))
        targets = token_targets(scene, board.cell_tokens)
        return {name: (out.argmax(-1) == targets[name]).float().mean().item() for name, out in outputs(scene).items()}

    return run.loop("tower", steps, {"tower": tower, "probes": probes, "optimisers": optimisers}, train, test)


# ---- stage 2


def due_budget(progress: float) -> float:
    """Share of the regions to read after a share of the steps."""
    part = int(progress / 0.6 * len(BUDGETS))
    return BUDGETS[part] if part < len(BUDGETS) else FINAL_BUDGET


def by_cells(board: Board, **settings: Any) -> gazepatch.GazeConfig:
    """The paper's gaze with a cell as region."""
    cell = board.cell_tokens
    return gazepatch.GazeConfig.paper(**({"region": (cell, cell, 1), "context_tokens": 0} | settings))


def let_gaze(model: LlavaForConditionalGeneration, preset: Preset, context_tokens: int) -> None:
    """Patch a model with fresh context tokens for each board, which are among its parameters from now on."""
    start = nn.Parameter(0.5 * torch.randn(context_tokens, preset.width, device=model.device))
    gazepatch.apply(model, by_cells(preset.board), context_tokens=start if context_tokens else None)


def answer_logits(model: LlavaForConditionalGeneration, batch: Batch, blind: bool = False) -> Tensor:
    """`[B, T + 1, V]` at the last position before the text and at all of the text."""
    out = model(
        input_ids=batch.ids,
        pixel_values=batch.pixel_values(blind).to(model.dtype),
        logits_to_keep=batch.text_tokens + 1,
        use_cache=False,
    )
    return out.logits


@torch.no_grad()
def measure(
    model: LlavaForConditionalGeneration, batches: list[Batch], around: Wrapper | None = None, blind: bool = False
) -> dict[str, float]:
    """Exact match of each task on held-out digits; `around` gives a context for each batch."""
    right: list[Tensor] = []
    for batch in batches:
        with around(batch) if around else nullcontext():
            right.append(right_tokens(batch, answer_logits(model, batch, blind)))
    return score(batches, right)


def align(model: LlavaForConditionalGeneration, preset: Preset, args: argparse.Namespace, steps: int = 200) -> None:
    """Teach the projector to write each visual token as the sum of the words for what it shows.

    Those are its row, column, digit, colour and tint, the last one turned by a place because colour and tint share
    their words. A decoder that first has to find out which word means which row stays on the prior for long.
    """
    board, tower, projector = preset.board, model.model.vision_tower, model.model.multi_modal_projector
    source, words = digits()[0].to(args.device), board.vocabulary()
    table = model.get_input_embeddings().weight.detach()
    lists = {"digit": [str(i) for i in range(10)], "colour": NAMES, "tint": NAMES}
    lists |= {axis: [f"{axis[0]}{i}" for i in range(board.cells)] for axis in ("row", "column")}
    vectors = {name: table[[words[word] for word in listed]] for name, listed in lists.items()}
    vectors["tint"] = vectors["tint"].roll(1, -1)
    optimiser = torch.optim.AdamW(projector.parameters(), lr=5e-3, weight_decay=0.0)
    for step in range(steps):
        scene = draw(board, source, BATCH[args.scale], 1, chance(args, 3, step)[0])
        targets = token_targets(scene, board.cell_tokens)
        wanted = torch.stack([vectors[name][target] for name, target in targets.items()]).sum(0)
        with torch.no_grad():
            features = tower(normalise(scene.pixels[:, 0])).last_hidden_state[:, 1:]
            if step == 0:
                _centre(projector.linear_1, features)
        loss = F.mse_loss(projector(features), wanted)
        optimiser.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if step % 50 == 0:
            print(f"align {step}: {loss.item():.4f} of {wanted.var().item():.4f}", flush=True)


def _centre(linear: nn.Linear, features: Tensor) -> None:
    """Start a layer so that it makes values of unit scale out of such features."""
    nn.init.normal_(linear.weight, std=linear.in_features**-0.5).div_(features.std())
    linear.bias.copy_(-linear.weight @ features.flatten(0, -2).mean(0))


def train_decoder(run: Run, model: LlavaForConditionalGeneration, preset: Preset) -> bool:
    """Stage 2: the projector learns to name what the tower sees, then the decoder to answer; each is frozen after."""
    args, board = run.args, preset.board
    steps = args.steps or STEPS[args.scale][1]
    model.model.vision_tower.requires_grad_(False)
    torch.manual_seed(args.seed)  # the same start whether the tower was trained just now or loaded
    if not args.start and not (run.folder / f"{args.mode}.pt").exists():
        align(model, preset, args)
    # Muon overwrites the projector within a few steps, before the decoder has learned to use what it says.
    model.model.multi_modal_projector.requires_grad_(False)
    gazes = args.mode == "gaze"
    if gazes and not args.start:
        let_gaze(model, preset, args.context_tokens)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimisers = Optimisers(named, steps, args.rate)
    parts: dict[str, Any] = {"model": model, "optimisers": optimisers}
    source = digits()[0].to(args.device)
    tests = evaluation_set(board, 64, device=args.device)

    def train(step: int) -> float:
        generator, rng = chance(args, 2, step)
        several = step >= args.first_steps and rng.random() < SEVERAL
        counts = FRAMES if several else FIRST if step < args.first_steps else MIX
        size = BATCH[args.scale] // (board.frames - 1 if several else 1)
        batch = make_batch(board, source, size, counts, generator, rng, striped=step < args.striped_steps)
        if gazes:
            gazepatch.set_budget(model, FINAL_BUDGET if args.start else due_budget(step / steps))
        with torch.autocast(args.device, torch.bfloat16):
            logits = answer_logits(model, batch)[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)
        optimisers.step(loss, step)
        return loss.item()

    def test() -> dict[str, Any]:
        return measure(model, tests)

    finished = run.loop(args.mode, steps, parts, train, test)
    if finished:
        blind = measure(model, tests, blind=True)
        run.log(stage=args.mode, blind=True, **blind)
        finish(run, model, preset)
    return finished


def trained_before(args: argparse.Namespace) -> LlavaForConditionalGeneration:
    """The model that an earlier run wrote, to go on training: it knows how to find a cell, and reads few regions."""
    args.first_steps = args.striped_steps = 0
    load: Any = gazepatch.load if args.mode == "gaze" else LlavaForConditionalGeneration.from_pretrained
    model: LlavaForConditionalGeneration = load(args.start, dtype=torch.float32)
    for part in (model.config.text_config, model.config.vision_config):
        part.dtype = None  # that of training: what is written is bfloat16 again
    return model.to(args.device)


def finish(run: Run, model: LlavaForConditionalGeneration, preset: Preset) -> None:
    """Write the model in bfloat16, or with gaze the artefact that holds it, its settings and context tokens."""
    if not gazepatch.is_patched(model):
        save(model, preset, run.folder / "dense")
        return
    gazepatch.set_budget(model, FINAL_BUDGET)
    budgets = [*BUDGETS, FINAL_BUDGET]
    provenance = {"objective": "next-token", "trainable": "full", "seed": run.args.seed, "budgets": budgets}
    model.to(torch.bfloat16)
    processor = make_processor(preset)
    gazepatch.save(model, run.folder / "gaze", full=True, processor=processor, provenance=provenance, force=True)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", choices=PRESETS, default="cpu")
    parser.add_argument("--mode", choices=("dense", "gaze"), default="dense")
    parser.add_argument("--out", required=True, help="folder for checkpoints, log and model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, help="stop after so long; the same command goes on from there")
    parser.add_argument("--tower", type=Path, help="tower.pt of another run, instead of stage 1")
    parser.add_argument("--start", type=Path, help="dense or gaze of another run, to train on from there")
    parser.add_argument("--context-tokens", type=int, default=0, help="for --mode gaze")
    parser.add_argument("--tower-steps", type=int, help="steps of stage 1")
    parser.add_argument("--steps", type=int, help="steps of stage 2")
    parser.add_argument("--first-steps", type=int, default=275, help="steps of stage 2 that ask for single cells only")
    parser.add_argument("--striped-steps", type=int, default=100, help="those of them that show striped boards")
    parser.add_argument("--rate", type=float, default=0.01, help="of Muon in stage 2")
    parser.add_argument("--log-every", type=int, default=100)
    args = parser.parse_args()
    require("sklearn")
    keep_memory()
    run, preset = Run(args), PRESETS[args.scale]
    torch.manual_seed(args.seed)
    model = trained_before(args) if args.start else build(preset).to(args.device)
    if args.tower:
        trained = torch.load(args.tower, map_location=args.device, weights_only=True)
        model.model.vision_tower.load_state_dict(trained["tower"])
    if (args.start or args.tower or train_tower(run, model, preset)) and train_decoder(run, model, preset):
        print(f"written to {run.folder / args.mode}")


if __name__ == "__main__":
    main()
