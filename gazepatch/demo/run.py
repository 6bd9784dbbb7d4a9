"""The demonstration from start to end: build, convert, load, ask, and print what came of it."""

from __future__ import annotations

import dataclasses
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gazepatch.config import GazeConfig
from gazepatch.demo.checkpoint import SIDE, build
from gazepatch.demo.page import PAGE, QUESTIONS
from gazepatch.files import writing

if TYPE_CHECKING:
    from gazepatch.answering import Answer

Show = Callable[[str], None]  # gets text to print as it is, line ends included

# The stand-in reads line by line and its tokens know nothing of the lines above, so regions are stretches of a line. A
# page this small would be read whole without the last setting: by default gaze begins where it saves time.
LINES = GazeConfig(region=(1, 16, 1), window=(1, 4, 1), min_visual_tokens=0)
WAYS = {
    "dense": None,
    "25%": LINES,
    "10%": dataclasses.replace(LINES, budget=0.1),
    "25% in squares": GazeConfig(min_visual_tokens=0),
}

INTRODUCTION = f"""\
A stock LLaVA reads a page of {len(PAGE.split())} words, {SIDE} x {SIDE} visual tokens, and answers questions about it.

  real       Its language model: SmolLM2-135M-Instruct with its pretrained weights. LLaVA's own code and image path.
  stand-in   Its vision tower: no trained encoder, but a CLIP tower with weights set by hand, which reads a page printed
             in glyphs of 4 x 4 pixels, one for each word piece, without error. A perfect OCR of one typeface.
  untrained  Nothing here was ever trained for gaze attention.

"""

LEGEND = """
Same next token: how often the choice is that of dense, along the dense answer. Per token: of the median answer.
Lines: regions of 16 tokens of one line, in windows of 4. In squares: the defaults, 6 x 6 in windows of 3 x 3, made for
pictures, where neighbours above and below belong together; they do not on this page. Entries read leaves out the means
of the windows, one for each 4 (or 9) tokens, which are always read. The page stays in the cache whole: what is saved is
reading. A model and a page this small are no measure of speed.
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

    Raises:
        ArtefactError: `folder` cannot be written to.
    """
    if folder is not None:
        with writing(folder):  # found now, and not after half a minute of building
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
    show(INTRODUCTION)
    if folder is not None:
        return _run(show, folder)
    with tempfile.TemporaryDirectory(prefix="gazepatch-demo-") as temporary:
        return _run(show, Path(temporary))


def _run(show: Show, folder: Path) -> list[Reading]:
    model, processor = _prepare(show, folder)
    readings: list[Reading] = []
    for name, settings in WAYS.items():
        with _step(show, f"{len(QUESTIONS)} questions, {name} "):
            readings.append(_read(show, model, processor, name, settings, readings[:1]))
    for place, (question, fact) in enumerate(QUESTIONS):
        show(f"\n{question}\n")
        for reading in readings:
            show(_line(reading.name, reading.answers[place], readings[0].answers[place], fact))
    show(_summary(readings) + LEGEND)
    return readings


def _prepare(show: Show, folder: Path) -> tuple[Any, Any]:
    """The model, loaded by way of a checkpoint and an artefact on disk and handed back dense, and its processor."""
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
    options = "--region 1,16,1 --window 1,4,1 --min-visual-tokens 0"
    with _step(show, f"gazepatch convert {base.name} -o {artefact.name} {options}"):
        gazepatch.convert(base, artefact, config=LINES, force=True)
    with _step(show, f"gazepatch.load({artefact.name!r})"):
        model, processor = gazepatch.load(artefact), AutoProcessor.from_pretrained(base)
    return gazepatch.restore(model), processor


def _read(
    show: Show, model: Any, processor: Any, name: str, settings: GazeConfig | None, dense: list[Reading]
) -> Reading:
    """Ask every question one way. `dense` holds the dense reading, unless this is it."""
    import gazepatch
    from gazepatch.demo.reading import Reader

    reading = Reading(name)
    if settings is not None:
        gazepatch.apply(model, settings)
    reader = Reader(model, processor)
    for place, (question, _) in enumerate(QUESTIONS):
        given = reader.ask(question)
        reading.answers.append(given)
        for tokens in (other.answers[place].tokens for other in dense):
            # An equal answer has gone along the dense one by itself.
            choices = tokens[1:] if given.tokens == tokens else reader.follow(question, tokens)
            reading.agreed += sum(a == b for a, b in zip(choices, tokens[1:], strict=True))
            reading.followed += len(choices)
        show(".")
    if settings is not None:
        gazepatch.restore(model)
    return reading


@contextmanager
def _step(show: Show, what: str) -> Iterator[None]:
    """Say what goes on, and how long it took."""
    show(what)
    began = time.perf_counter()
    yield
    show(f"  {time.perf_counter() - began:.1f} s\n")


WIDTH = max(map(len, WAYS))


def _line(name: str, given: Answer, dense: Answer, fact: str) -> str:
    text = "= the same" if given is not dense and given.tokens == dense.tokens else " ".join(given.text.split())
    verdict = "right" if fact in given.text else "WRONG"
    share = "all" if given.read_share is None else f"{given.read_share:.1%}"
    rate = "-" if given.per_token_s is None else f"{given.per_token_s * 1000:.1f} ms"
    return f"  {name:<{WIDTH}}  {share:>5} read  {rate:>8}  {verdict}  {text}\n"


def _summary(readings: list[Reading]) -> str:
    lines = [f"\n{'':<{WIDTH}}  right  same answer  same next token  entries read  per token\n"]
    for reading in readings:
        count = len(reading.answers)
        right = sum(fact in given.text for given, (_, fact) in zip(reading.answers, QUESTIONS, strict=True))
        same = sum(a.tokens == b.tokens for a, b in zip(reading.answers, readings[0].answers, strict=True))
        agreed = f"{reading.agreed / reading.followed:.1%}" if reading.followed else "-"
        shares = [given.read_share for given in reading.answers if given.read_share is not None]
        read = f"{sum(shares) / len(shares):.1%}" if shares else "all"
        times = sorted(given.per_token_s for given in reading.answers if given.per_token_s is not None)
        cells = f"{f'{right}/{count}':>5}  {f'{same}/{count}':>11}  {agreed:>15}  {read:>12}"
        lines.append(f"{reading.name:<{WIDTH}}  {cells}  {times[len(times) // 2] * 1000:>6.1f} ms\n")
    return "".join(lines)
