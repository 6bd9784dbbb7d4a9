"""`gazepatch look`: the page and the JSON, and what is drawn where."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image
from tiny import tiny
from tiny_reader import write_reader

import gazepatch
from gazepatch.cli import main
from gazepatch.config import GazeConfig
from gazepatch.pictures import MAX_PX, as_seen, data_url
from gazepatch.verification import generate_logits
from gazepatch.viewer import _panels, _texts, render

NASTY = '</script><img src=x onerror="alert(1)"> & \u2028 <!-- '


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = write_reader(tmp_path_factory.mktemp("models") / "reader")
    return gazepatch.convert(base, base.parent / "gaze", config=GazeConfig(budget=0.25, min_visual_tokens=0))


@pytest.fixture
def page(tmp_path: Path) -> Path:
    Image.new("RGB", (112, 112), (200, 100, 50)).save(tmp_path / "page.png")
    return tmp_path / "page.png"


def look(*args: object) -> Result:
    return CliRunner().invoke(main, ["look", *(str(arg) for arg in args)])


def data_of(html: str) -> Any:
    """What is embedded in a page."""
    found = re.search(r'<script type="application/json" id="trace">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_page(artefact: Path, page: Path, tmp_path: Path) -> None:
    out = tmp_path / "look.html"
    result = look(artefact, page, f"what is {NASTY}", "--max-new-tokens", 5, "-o", out)
    assert result.exit_code == 0, result.output
    *_, last = result.stdout.splitlines()
    assert re.fullmatch(rf"\[\d\d\.\d% of the visual entries read: {out}\]", last)
    html = out.read_text(encoding="utf-8")
    assert html.count("</script>") == 2 and "<img" not in html and NASTY not in html
    assert "default-src 'none'" in html
    assert re.findall(r"https?://|<[^>]*\b(?:src|href)=|@import|url\(", html) == []
    data = data_of(html)
    assert data["prompt"] == f"what is {NASTY}" and data["model"] == str(artefact)
    assert "".join(token["text"] for token in data["tokens"]).strip() == data["text"]
    (panel,) = data["panels"]
    assert panel["title"] == "image 1" and (panel["span"], panel["rows"], panel["columns"]) == (0, 28, 28)
    picture = Image.open(io.BytesIO(base64.b64decode(panel["url"].removeprefix("data:image/png;base64,"))))
    assert picture.size == (112, 112) and picture.getpixel((5, 5)) == (200, 100, 50)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["look.html", "page.png"]


def test_json(artefact: Path, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = look(artefact, page, "what is this ?", "--max-new-tokens", 4, "--json")
    assert result.exit_code == 0, result.output
    traced = json.loads(result.stdout)
    assert traced["settings"]["budget"] == 0.25
    assert [span["grid"] for span in traced["spans"]] == [[1, 28, 28]]
    assert [region["number"] for region in traced["regions"]] == list(range(25))
    first, *others = traced["tokens"]
    assert first["layers"] is None and first["read_share"] is None
    assert len(others) == 3
    for token in others:
        assert list(token["layers"]) == ["0", "1"]
        assert all(len(heads) == 2 and all(len(h) == 7 for h in heads) for heads in token["layers"].values())
    assert sum(token["read_share"] for token in others) / 3 == pytest.approx(traced["read_share"])
    assert not (tmp_path / "gaze.html").exists()
    asked = json.loads(
        CliRunner()
        .invoke(main, ["ask", str(artefact), str(page), "what is this ?", "--max-new-tokens", "4", "--json"])
        .stdout
    )
    assert [token["id"] for token in traced["tokens"]] == asked["gaze"]["tokens"]


def test_the_page_has_a_name_of_its_own(artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = look(artefact, "what is this ?", "--max-new-tokens", 2)
    assert result.exit_code == 0 and "[no images to read: gaze.html]" in result.stdout
    data = data_of((tmp_path / "gaze.html").read_text(encoding="utf-8"))
    assert data["panels"] == [] and data["regions"] == []
    assert [token["layers"] for token in data["tokens"]] == [None, None]


def test_bad_usage(artefact: Path, page: Path, tmp_path: Path) -> None:
    for message, args in (
        ("does not exist", (artefact, "no.png", "this")),
        ("no folder", (artefact, page, "this", "-o", tmp_path / "no" / "look.html")),
        ("is not a regular file", (artefact, page, "this", "-o", os.devnull)),
    ):
        result = look(*args)
        assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    artefact: Path, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "look.html").write_text("old")

    def full(self: Path, data: bytes) -> None:
        self.write_text(data[:10].decode())
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", full)
    result = look(artefact, page, "this", "--max-new-tokens", 2, "-o", tmp_path / "look.html")
    assert result.exit_code == 1 and "no space left" in result.stderr
    assert (tmp_path / "look.html").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["look.html", "page.png"]


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_script_is_javascript(tmp_path: Path) -> None:
    html = render({"tokens": [], "spans": [], "regions": []}, [], None)
    script = html.rpartition("<script>")[2].partition("</script>")[0]
    (tmp_path / "viewer.js").write_text(script, encoding="utf-8")
    run = subprocess.run(["node", "--check", tmp_path / "viewer.js"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# ---- what is drawn where


def panels(name: str, pictures: int, video: bool = False) -> list[dict[str, Any]]:
    case = tiny(name, video=video)
    with (
        gazepatch.patched(case.model, region=(3, 3, 1), window=None, min_visual_tokens=0),
        gazepatch.trace(case.model) as trace,
    ):
        generate_logits(case.model, case.inputs, 1)
    images = [Image.new("RGB", (40, 30)) for _ in range(pictures)]
    return [
        {name: value for name, value in panel.items() if name != "url"} | {"picture": "url" in panel}
        for panel in _panels(trace.to_dict()["spans"], images, None)
    ]


def grid(title: str, span: int, rows: int, columns: int, frame: int = 0, picture: bool = False) -> dict[str, Any]:
    return {"title": title, "span": span, "frame": frame, "rows": rows, "columns": columns, "picture": picture}


def test_one_span_an_image_is_drawn_on_it() -> None:
    assert panels("qwen2_vl", 2) == [
        grid("image 1", 0, 8, 8, picture=True),
        grid("image 2", 1, 7, 11, picture=True),
    ]


def test_tiles_are_drawn_beside_the_image() -> None:
    assert panels("llava_next", 2) == [
        {"title": "image 1", "picture": True},
        grid("image 1, tile 1", 0, 6, 6),
        grid("image 1, tile 2", 1, 10, 12),
        {"title": "image 2", "picture": True},
        grid("image 2, tile 1", 2, 6, 6),
        grid("image 2, tile 2", 3, 6, 18),
    ]


def test_crops_that_count_as_images_belong_to_no_picture() -> None:
    assert panels("qwen2_vl", 1) == [
        {"title": "image 1", "picture": True},
        grid("image 1", 0, 8, 8),
        grid("image 2", 1, 7, 11),
    ]


def test_frames_are_drawn_one_by_one() -> None:
    drawn = panels("qwen2_vl", 0, video=True)
    assert drawn[:4] == [
        *(grid(f"image 1, frame {frame + 1}", 0, 6, 10, frame) for frame in range(3)),
        grid("image 2, frame 1", 1, 5, 4),
    ]


def test_tokens_without_a_grid_are_a_row() -> None:
    span = {"media": 0, "tile": None, "frame": None, "grid": None, "start": 3, "stop": 10}
    drawn = _panels([span], [Image.new("RGB", (4, 4))], None)
    assert drawn[1] == {"title": "image 1, grid not known, tokens in a row"} | {
        "span": 0,
        "frame": 0,
        "rows": 1,
        "columns": 7,
    }


def processor(**settings: Any) -> Any:
    return SimpleNamespace(**settings)


def test_only_what_the_model_gets_is_shown() -> None:
    image = Image.new("RGB", (300, 200))
    image.paste((255, 0, 0), (50, 0, 250, 200))
    square = {"height": 28, "width": 28}
    cut = as_seen(image, processor(do_center_crop=True, size={"shortest_edge": 28}, crop_size=square))
    assert cut.size == (200, 200) and cut.getcolors() == [(40000, (255, 0, 0))]
    closer = as_seen(image, processor(do_center_crop=True, size={"shortest_edge": 56}, crop_size=square))
    assert closer.size == (100, 100)
    padded = as_seen(image, processor(do_center_crop=True, do_resize=False, crop_size={"height": 400, "width": 300}))
    assert padded.size == (300, 400) and padded.getpixel((100, 99)) == (0, 0, 0)
    for whole in (
        processor(do_center_crop=False, size={"shortest_edge": 28}, crop_size=square),
        processor(do_center_crop=True, size=square, crop_size=square),
        processor(do_resize=True),
        None,
    ):
        assert as_seen(image, whole).size == (300, 200)

    class LlavaImageProcessorPil:
        do_pad = do_center_crop = True

    assert as_seen(image, LlavaImageProcessorPil()).size == (300, 300)

    class MllamaImageProcessorPil:
        do_pad = True

    padded = as_seen(image, MllamaImageProcessorPil())
    assert padded.size == (300, 300) and padded.getpixel((100, 199)) == (255, 0, 0)
    assert padded.getpixel((100, 201)) == (0, 0, 0)


def test_large_pictures_are_made_smaller() -> None:
    url = data_url(Image.new("L", (3000, 10)))
    assert Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size == (MAX_PX, 3)


def test_characters_of_several_tokens_come_with_the_last_one() -> None:
    parts = [b" caf", b"\xc3", b"\xa9", b" <eos>", b"\xf0\x9f"]
    decoder = SimpleNamespace(decode=lambda ids, **_: b"".join(parts[i] for i in ids).decode(errors="replace"))
    texts = _texts(decoder, range(5))
    assert texts[0] == " caf" and texts[2:4] == ["\u00e9", " <eos>"]
    assert texts[1] == texts[4] == "\ufffd"
