"""What training brings to the small VLM of examples/digits_vlm, which was trained densely.

    python benchmarks/train_digits.py DIR [--json]

Draws boards, trains adapters and context tokens (or what it is asked to) to follow the dense model at a tenth of the
regions, and measures on boards of held-out digits how often the most likely next token is that of dense attention.
Few regions lose the questions that need the whole board, so training asks more of those than the evaluation does.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import torch
from gap import Gap, write_conversations
from transformers import AutoModelForImageTextToText, AutoProcessor

import gazepatch

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "digits_vlm"
sys.path.insert(0, str(EXAMPLE))
from data import EVALUATION  # noqa: E402
from model import PRESETS  # noqa: E402
from packages import require  # noqa: E402
from PIL import Image  # noqa: E402
from questions import ask  # noqa: E402
from scenes import Digits, digits, draw  # noqa: E402

BOARD = PRESETS["cpu"].board
#: Questions of a board, to train with and to evaluate.
TRAINING, HELD_OUT = {"digit": 2, "colour": 1, "row": 2, "more": 8, "most": 1}, EVALUATION[0]


def write_records(folder: Path, name: str, source: Digits, questions: dict[str, int], count: int, seed: int) -> Path:
    """Boards as images, and a file of conversations about them."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    (folder / name).mkdir(parents=True, exist_ok=True)
    records = []
    for first in range(0, count, 100):
        scene = draw(BOARD, source, min(100, count - first), 1, generator)
        for row, pixels in enumerate(scene.pixels[:, 0]):
            path = f"{name}/{first + row}.png"
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / path)
            messages = []
            for question in ask(scene, row, questions, rng):
                messages.append({"role": "user", "content": " ".join([*question.words, "="])})
                messages.append({"role": "assistant", "content": " ".join(question.answer)})
            messages[0]["content"] = "<image>" + messages[0]["content"]
            records.append({"messages": messages, "images": [path]})
    return write_conversations(folder, name, records)


def main() -> None:
    """Parse the command line, train and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for the boards and the artefact")
    parser.add_argument("--boards", type=int, default=5200)
    parser.add_argument("--held-out", type=int, default=160)
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--context-tokens", type=int, default=8)
    parser.add_argument("--trainable", default="lora")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=0.003)
    parser.add_argument("--context-learning-rate", type=float, default=0.02)
    parser.add_argument("--schedule", type=float, default=0.0)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    require("sklearn")
    base = EXAMPLE / "models" / "dense"
    processor = AutoProcessor.from_pretrained(base)
    train, test = digits()
    data = write_records(args.folder, "boards", train, TRAINING, args.boards, seed=1)
    held_out = write_records(args.folder, "held-out", test, HELD_OUT, args.held_out, seed=2)
    cell = BOARD.cell_tokens
    config = gazepatch.GazeConfig.paper(region=(cell, cell, 1), budget=args.budget, context_tokens=args.context_tokens)
    gap = Gap(args, processor, held_out)
    gap.measure_untrained(AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval(), config)
    names = ("trainable", "batch_size", "learning_rate", "context_learning_rate", "schedule", "lora_rank")
    training = {name: getattr(args, name) for name in names}
    if args.trainable == "context":
        training["learning_rate"] = training.pop("context_learning_rate")
    with gap.training():
        out = gazepatch.train(
            base, data, args.folder / "artefact", config=config, epochs=1.0, log_every=10, force=True, **training
        )
    gap.close(gazepatch.load(out, dtype=torch.float32).eval())


if __name__ == "__main__":
    main()
