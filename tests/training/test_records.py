"""Records of a training, and what it minimises."""

from __future__ import annotations

import base64
import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from talking import SIDE_PX, TURNS, write_image
from transformers.image_utils import load_image

from gazepatch import TrainingError
from gazepatch.training.images import open_image
from gazepatch.training.objectives import agreed, distill, next_token
from gazepatch.training.records import read_records

# ---- records


def one_record(folder: Path, values: Any) -> Any:
    path = folder / "one.jsonl"
    path.write_text("\n" + (values if isinstance(values, str) else json.dumps(values)) + "\n")
    return read_records(path)[0]


def test_both_forms_of_records(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", 0)
    place, user, said = {"type": "image"}, {"type": "text", "text": "w8"}, {"type": "text", "text": "w9"}
    expected = [{"role": "user", "content": [place, user]}, {"role": "assistant", "content": [said]}]
    listed = [{"role": "user", "content": [place, user]}, {"role": "assistant", "content": [said]}]
    inside = [{"role": "user", "content": [{"type": "image", "image": "a.png"}, user]}, TURNS[1]]
    llava = [{"from": "human", "value": "<image>w8"}, {"from": "gpt", "value": "w9"}]
    for values in (
        {"messages": TURNS, "images": ["a.png"]},
        {"messages": listed, "images": ["a.png"]},
        {"messages": inside},
        {"conversations": llava, "image": "a.png", "id": 7, "videos": [], "video": None},
    ):
        record = one_record(tmp_path, values)
        assert (record.messages, record.images, record.where) == (expected, ["a.png"], "one.jsonl, line 2")


def test_messages_without_text(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", 0)
    silent = {"role": "user", "content": ""}
    empty = {"type": "text", "text": ""}
    assert one_record(tmp_path, {"messages": [silent, TURNS[1]]}).messages[0]["content"] == [empty]
    asked = one_record(tmp_path, {"messages": [silent, TURNS[1]], "images": ["a.png"]}).messages[0]["content"]
    assert asked == [{"type": "image"}, empty]


def test_embedded_images(tmp_path: Path) -> None:
    from gazepatch.training.images import open_image

    write_image(tmp_path / "a.png", 0)
    path = write_image(tmp_path / "a b.png", 0)  # whose URL is quoted
    text = base64.b64encode(path.read_bytes()).decode()
    expected = Image.open(path).convert("RGB")
    held: list[Any] = [str(path), "a.png", f"data:image/png;base64,{text}", {"bytes": text}]
    held += [
        path.as_uri(),
        {"url": f"file://localhost{path}"},
        {"bytes": path.read_bytes(), "path": None},
        {"path": "a.png"},
        expected,
    ]
    for image in held:
        assert open_image(image, tmp_path, "here").tobytes() == expected.tobytes()
    for wrong in ("data:image/png;base64,@@", {"bytes": "AAAA"}):
        with pytest.raises(TrainingError, match="here: an image cannot be read"):
            open_image(wrong, tmp_path, "here")


NOTHING = {"role": "assistant", "content": " \n"}
DRAWN = {"role": "assistant", "content": "w9 <image>"}
BROKEN: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "line 2: must be JSON, one record a line"),
    "no object": ("3", "must be a JSON object, got int"),
    "no messages": ({"text": "w8"}, "expected a list 'messages'.* got the keys text"),
    "empty": ({"messages": []}, "expected a list 'messages'"),
    "no assistant": ({"messages": TURNS[:1]}, "expected a message of the assistant"),
    "assistant first": ({"messages": TURNS[::-1]}, "line 2: expected a question first, got a message of the assistant"),
    "no answer": (
        {"messages": [*TURNS, TURNS[0], NOTHING]},
        "line 2: expected text of the assistant in message 3, got none",
    ),
    "drawn": ({"messages": [TURNS[0], DRAWN], "images": ["a.png"]}, "assistant in message 1, got an image: drop"),
    "no role": ({"messages": [{"content": "w8"}]}, "message 0 must have a 'role'"),
    "no content": ({"messages": [{"role": "user"}]}, "message 0 must have 'content'"),
    "text as message": ({"messages": ["w8"]}, "message 0 must be an object, got str"),
    "other part": ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "message 0 may hold"),
    "too few images": ({"conversations": [{"from": "human", "value": "<image>"}, TURNS[1]]}, "for each of 1 .* got 0"),
    "missing image": ({"messages": TURNS, "images": ["no.png"]}, "line 2: no image at .*no.png"),
    "address": ({"messages": TURNS, "images": ["https://x.org/a.png"]}, "not fetched from the network"),
    "address of a file": ({"messages": TURNS, "images": ["file://a.png"]}, "must be file:/// and a whole path, got"),
    "file elsewhere": ({"messages": TURNS, "images": ["file:///no/a.png"]}, "line 2: no image at /no/a.png"),
    "videos": ({"messages": TURNS, "videos": ["v.mp4"]}, "line 2: expected images only, got the key 'videos': give"),
    "video": ({"conversations": TURNS, "video": "v.mp4"}, "line 2: expected images only, got the key 'video'"),
    "video mark": (
        {"messages": [{"role": "user", "content": "<video>w8"}, TURNS[1]]},
        "only, got <video> in message 0",
    ),
    "number": ({"messages": TURNS, "images": 3}, "images must be a list, got 3"),
    "numbers": ({"messages": TURNS, "images": [3]}, "an image must be a path"),
}


@pytest.mark.parametrize(("values", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_records(values: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=message):
        one_record(tmp_path, values if isinstance(values, str) else json.dumps(values))


def test_where_records_may_be(tmp_path: Path, data: Path) -> None:
    assert len(read_records(data.parent)) == len(read_records(data)) == 8
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps([{"messages": TURNS}] * 3))
    assert [len(read_records(tmp_path)), read_records(listed)[2].where] == [3, "list.json, record 3"]
    with pytest.raises(IndexError):
        read_records(listed)[3]
    listed.write_text(json.dumps([{"messages": TURNS}, {}]))
    with pytest.raises(TrainingError, match=r"list\.json, record 2: expected a list 'messages'"):
        read_records(listed)
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(TrainingError, match="expected records, got none"):
        read_records(tmp_path)
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(TrainingError, match=r"one file of records .* got a.jsonl, b.jsonl"):
        read_records(tmp_path)
    with pytest.raises(TrainingError, match="got nothing at"):
        read_records(tmp_path / "c.jsonl")


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    line = json.dumps({"messages": TURNS})
    for name, text, count in (("list.json", f"\n[{line}, {line}]", 2), ("lines.jsonl", f"{line}\n", 1)):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert len(read_records(tmp_path / name)) == count


def test_sets_of_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TrainingError, match="pip install datasets"):
        read_records("owner/talk")

    class Rows(list[Any]):
        _fingerprint = "f00"

    picture = Image.new("RGB", (SIDE_PX, SIDE_PX))
    rows = Rows([{"messages": TURNS, "images": [picture]}, {"messages": []}])
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda name, split: rows))
    records = read_records("owner/talk")
    assert (records.name, records.digest, len(records), records[0].images) == ("owner/talk", "f00", 2, [picture])
    with pytest.raises(TrainingError, match="owner/talk, record 2: expected a list"):
        records[1]
    checked: list[str] = []
    read_records("owner/talk", lambda record: checked.append(record.where))
    assert checked == ["owner/talk, record 1"]


def test_photos_are_upright_as_in_transformers(tmp_path: Path) -> None:
    path, exif = tmp_path / "photo.jpg", Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    Image.linear_gradient("L").resize((40, 20)).convert("RGB").save(path, exif=exif)
    assert open_image(str(path), tmp_path, "line 1") == load_image(str(path))
    assert open_image(str(path), tmp_path, "line 1").size == (20, 40)


def test_records_can_be_sent_to_workers(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    path.write_text((json.dumps({"messages": TURNS}) + "\n") * 2)
    records = read_records(path)
    assert pickle.loads(pickle.dumps(records))[1] == records[1]


# ---- objectives


def test_objectives() -> None:
    one, other = torch.randn(2, 5, 7)
    assert distill(one, one).item() == pytest.approx(0, abs=1e-6)
    p, q = other.softmax(-1), one.softmax(-1)
    torch.testing.assert_close(distill(one, other), (p * (p / q).log()).sum())
    torch.testing.assert_close(next_token(one, torch.arange(5)), -q[range(5), range(5)].log().sum())
    assert agreed(one, one) == 5
