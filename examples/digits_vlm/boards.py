"""A few boards of held-out digits as image files, with questions and answers: for the demo and the tests.

They need neither scikit-learn nor a seed. `python examples/digits_vlm/boards.py` draws them anew.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).parent / "boards"


@dataclass(frozen=True)
class Asked:
    """Questions about some images, asked one after the other.

    Attributes:
        images: File names in `FOLDER`.
        turns: Each a task, a question up to its `=`, and the answer up to its full stop.
    """

    images: list[str]
    turns: list[tuple[str, str, str]]

    def open(self) -> list[Image.Image]:
        """The images."""
        return [Image.open(FOLDER / name).convert("RGB") for name in self.images]


def load() -> list[Asked]:
    """All that are shipped."""
    listed = json.loads((FOLDER / "questions.json").read_text(encoding="utf-8"))
    return [Asked(one["images"], [tuple(turn) for turn in one["turns"]]) for one in listed]


def main(sequences: int = 4) -> None:
    """Draw `sequences` of one board and as many of several frames."""
    from data import evaluation_set
    from model import PRESETS

    FOLDER.mkdir(exist_ok=True)
    asked = []
    for batch in evaluation_set(PRESETS["cpu"].board, sequences, seed=2):
        for row, questions in enumerate(batch.questions):
            names = []
            for frame in batch.scene.pixels[row]:
                names.append(f"{sum(map(len, (one.images for one in asked))) + len(names):02d}.png")
                Image.fromarray(frame.permute(1, 2, 0).numpy()).save(FOLDER / names[-1], optimize=True)
            turns = [(q.task, " ".join([*q.words, "="]), " ".join(q.answer)) for q in questions]
            asked.append(Asked(names, turns))
    text = json.dumps([asdict(one) for one in asked], indent=1)
    (FOLDER / "questions.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
