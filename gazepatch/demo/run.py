"""The demonstration from start to end: build, convert, load, ask, and print what came of it."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gazepatch.demo.checkpoint import SIDE, build
from gazepatch.demo.page import PAGE, QUESTIONS

if TYPE_CHECKING:
    from gazepatch.answering import Answer

BUDGETS = (0.25, 0.1)
Show = Callable[[str], None]  # gets text to print as it is, line ends included

INTRODUCTION = f"""\
A stock LLaVA reads a page of {len(PAGE.split())} words, which are {SIDE} x {SIDE} = {SIDE**2} visual tokens, and answers questions.

  real       Its language model: SmolLM2-135M-Instruct with its pretrained weights. LLaVA's own code and image path.
  stand-in   Its vision tower: no trained encoder, but a CLIP tower with weights set by hand, which reads a page printed
             in glyphs of 4 x 4 pixels, one for each word piece, without error. A perfect OCR of one typeface.
  untrained  Nothing here was ever trained for gaze attention.

"""


@dataclass
class Reading:
    """What one way of reading did over all questions; `followed` and `agreed` count tokens of the dense answers."""

    name: str
    answers: list[Answer] = field(default_factory=list)
    followed: int = 0
    agreed: int = 0


def run(show: Show, folder: Path | None = None) -> list[Reading]:
    """Run the demonstration and return its figures, dense first.

    Args:
        show: Prints.
        folder: Where to build and keep the checkpoint and its artefact; a checkpoint that is there already is used
            again. By default a temporary folder.
    """
    show(INTRODUCTION)
    if folder is not None:
        return _run(show, folder)
    with tempfile.TemporaryDirectory(prefix="gazepatch-demo-") as temporary:
        return _run(show, Path(temporary))


def _run(show: Show, folder: Path) -> list[Reading]:
    model, processor = _prepare(show, folder)
    readings = _read(show, model, processor)
    for place, (question, fact) in enumerate(QUESTIONS):
        show(f"\n{question}\n")
        for reading in readings:
            show(_line(reading.name, reading.answers[place], readings[0].answers[place], fact))
    show(_summary(readings))
    return readings


def _prepare(show: Show, folder: Path) -> tuple[Any, Any]:
    """The patched model, by way of a checkpoint and an artefact on disk, and its processor."""
    import transformers
    from transformers import AutoProcessor

    import gazepatch

    transformers.utils.logging.disable_progress_bar()  # our own steps say what goes on
    transformers.utils.logging.set_verbosity_error()
    base, artefact = folder / "reader", folder / "reader-gaze"
    if not (base / "processor_config.json").is_file():  # what `build` writes last
        # Bars that nothing else switches off go to stderr.
        with _step(show, "building the checkpoint (half a minute)"), redirect_stderr(io.StringIO()):
            build(base)
    with _step(show, f"gazepatch convert {base.name} -o {artefact.name}"):
        gazepatch.convert(base, artefact, force=True)
    with _step(show, f"gazepatch.load({artefact.name!r})"):
        return gazepatch.load(artefact), AutoProcessor.from_pretrained(base)


def _read(show: Show, model: Any, processor: Any) -> list[Reading]:
    """Ask everything densely, then at each budget. The model is handed back dense."""
    import gazepatch
    from gazepatch.demo.reading import Reader

    settings = gazepatch.inspect(model).settings
    gazepatch.restore(model)
    readings = [Reading("dense"), *(Reading(f"{budget:.0%}") for budget in BUDGETS)]
    for reading, budget in zip(readings, (None, *BUDGETS), strict=True):
        with _step(show, f"{len(QUESTIONS)} questions, {reading.name} "):
            if budget is not None:
                gazepatch.apply(model, settings, budget=budget)
            reader = Reader(model, processor)
            for place, (question, _) in enumerate(QUESTIONS):
                reading.answers.append(reader.ask(question))
                dense = readings[0].answers[place].tokens
                if budget is not None:
                    reading.agreed += sum(
                        a == b for a, b in zip(reader.follow(question, dense), dense[1:], strict=True)
                    )
                    reading.followed += len(dense) - 1
                show(".")
            if budget is not None:
                gazepatch.restore(model)
    return readings


@contextmanager
def _step(show: Show, what: str) -> Iterator[None]:
    """Say what goes on, and how long it took."""
    show(what)
    began = time.perf_counter()
    yield
    show(f"  {time.perf_counter() - began:.1f} s\n")


def _line(name: str, given: Answer, dense: Answer, fact: str) -> str:
    text = "= the same" if given is not dense and given.tokens == dense.tokens else " ".join(given.text.split())
    verdict = "right" if fact in given.text else "WRONG"
    return f"  {name:>5}  {_share(given):>6} read  {_per_token(given):>9}  {verdict}  {text}\n"


def _summary(readings: list[Reading]) -> str:
    lines = ["\nway    right   same answer  same next token  entries read  per token\n"]
    for reading in readings:
        same = sum(a.tokens == b.tokens for a, b in zip(reading.answers, readings[0].answers, strict=True))
        count = len(reading.answers)
        right = sum(fact in given.text for given, (_, fact) in zip(reading.answers, QUESTIONS, strict=True))
        shares = [given.read_share for given in reading.answers if given.read_share is not None]
        read = f"{sum(shares) / len(shares):.1%}" if shares else "all"
        times = sorted(given.per_token_s for given in reading.answers if given.per_token_s is not None)
        agreed = f"{reading.agreed / reading.followed:.1%}" if reading.followed else "-"
        median = f"{times[len(times) // 2] * 1000:.1f} ms"
        lines.append(
            f"{reading.name:<5}  {right:>2}/{count:<2}   {same:>2}/{count:<2}        {agreed:>6}           "
            f"{read:>6}        {median}\n"
        )
    lines.append(
        "\nSame next token: how often the choice is that of dense, along the dense answer. Per token: the median\n"
        "answer's. The page stays in the cache whole, what is saved is reading. A model and a page this small are no\n"
        "measure of speed.\n"
    )
    return "".join(lines)


def _share(given: Answer) -> str:
    return "all" if given.read_share is None else f"{given.read_share:.1%}"


def _per_token(given: Answer) -> str:
    return "-" if given.per_token_s is None else f"{given.per_token_s * 1000:.1f} ms"
