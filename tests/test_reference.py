"""The definition itself: one case worked out with `math.exp` on lists, and the identities that it must obey."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gazepatch.config import GazeConfig
from gazepatch.layout import Span
from gazepatch.reference import gaze_reference

SCALE = 0.5
IMAGE = Span(0, 0, 4, (1, 2, 2), 0)
QUERY = [1.0, 2.0]
# Two columns of two tokens: region 0 holds the tokens 0 and 2, region 1 the tokens 1 and 3. Then two of text.
KEYS = [[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [-1.0, 0.5], [0.5, 0.5], [0.0, -1.0]]
VALUES = [[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0], [5.0, 50.0], [6.0, 60.0]]
COLUMNS = dict(region=(2, 1, 1), window=None, min_visual_tokens=0)


def attended(query: list[float], **settings: Any) -> tuple[list[float], list[bool]]:
    visible = torch.ones(6, dtype=torch.bool)
    key, value = torch.tensor([KEYS]), torch.tensor([VALUES])
    result = gaze_reference(torch.tensor([query]), key, value, [IMAGE], GazeConfig(**settings), SCALE, visible)
    return result.output[0].tolist(), result.kept[0].tolist()


def average(weighted: list[tuple[float, list[float]]]) -> list[float]:
    total = sum(weight for weight, _ in weighted)
    return [pytest.approx(sum(weight * value[i] for weight, value in weighted) / total) for i in range(2)]


def weight(query: list[float], key: list[float], count: int = 1) -> float:
    return count * math.exp(SCALE * (query[0] * key[0] + query[1] * key[1]))


def test_by_hand_without_periphery() -> None:
    # Mean keys are (1.5, 0.5) and (-0.5, 0.75): region 0 is selected.
    output, kept = attended(QUERY, **COLUMNS, budget=1, periphery=False)
    assert kept == [True, False, True, False, True, True]
    assert output == average([(weight(QUERY, KEYS[i]), VALUES[i]) for i in (0, 2, 4, 5)])


def test_by_hand_with_periphery() -> None:
    output, kept = attended(QUERY, **COLUMNS, budget=1, periphery=True)
    assert kept == [True, False, True, False, True, True]
    far = (weight(QUERY, [-0.5, 0.75], count=2), [3.0, 30.0])
    assert output == average([(weight(QUERY, KEYS[i]), VALUES[i]) for i in (0, 2, 4, 5)] + [far])


def test_by_hand_the_other_region() -> None:
    output, kept = attended([-1.0, 2.0], **COLUMNS, budget=1, periphery=True)
    assert kept == [False, True, False, True, True, True]
    far = (weight([-1.0, 2.0], [1.5, 0.5], count=2), [2.0, 20.0])
    assert output == average([(weight([-1.0, 2.0], KEYS[i]), VALUES[i]) for i in (1, 3, 4, 5)] + [far])


def test_by_hand_soft_cap_and_sink() -> None:
    visible, cap, sink = torch.ones(6, dtype=torch.bool), 0.6, 0.25
    config = GazeConfig(**COLUMNS, budget=1, periphery=True)
    key, value = torch.tensor([KEYS]), torch.tensor([VALUES])
    query, sinks = torch.tensor([QUERY]), torch.tensor([sink])
    output, kept = gaze_reference(query, key, value, [IMAGE], config, SCALE, visible, cap, sinks)
    assert kept[0].tolist() == [True, False, True, False, True, True]

    def capped(key: list[float], count: int = 1) -> float:
        return count * math.exp(cap * math.tanh(math.log(weight(QUERY, key)) / cap))

    read = [(capped(KEYS[i]), VALUES[i]) for i in (0, 2, 4, 5)]
    far = (capped([-0.5, 0.75], count=2), [3.0, 30.0])
    assert output[0].tolist() == average([*read, far, (math.exp(sink), [0.0, 0.0])])


@pytest.mark.parametrize(
    ("keys", "window", "expected"),
    [
        # Two columns of two tokens again, the keys being the logits.
        ([5.0, 1.0, -5.0, 1.0], None, 1),  # means 0 and 1
        ([5.0, 1.0, -5.0, 1.0], (1, 1, 1), 0),  # exp(5) + exp(-5) > 2 exp(1)
        ([2.0, 1.5, -5.0, 1.5], (1, 1, 1), 1),  # exp(2) + exp(-5) < 2 exp(1.5)
    ],
    ids=["by the mean", "by the best window", "by all windows"],
)
def test_by_hand_windows_make_the_score(keys: list[float], window: Any, expected: int) -> None:
    key, value, visible = torch.tensor(keys).view(1, 4, 1), torch.ones(1, 4, 1), torch.ones(4, dtype=torch.bool)
    config = GazeConfig(region=(2, 1, 1), window=window, budget=1, periphery=False, min_visual_tokens=0)
    kept = gaze_reference(torch.ones(1, 1), key, value, [IMAGE], config, 1.0, visible).kept[0]
    assert kept.nonzero()[:, 0].tolist() == [expected, expected + 2]


@pytest.mark.parametrize(
    ("head_reduce", "expected"),
    [("mean", [1, 1, 1]), ("max", [0, 0, 0]), ("none", [0, 1, 1])],
    ids=["mean", "max", "none"],
)
def test_by_hand_heads_of_a_group(head_reduce: str, expected: list[int]) -> None:
    # One token a region. Softmax over the regions: head 0 has (0.9, 0.1), heads 1 and 2 have (0.2, 0.8) each.
    odds = torch.tensor([[9.0], [0.25], [0.25]]).log()
    key = torch.tensor([[[1.0], [0.0], [0.0]]])
    config = GazeConfig(
        region=(1, 1, 1), window=None, budget=1, periphery=False, min_visual_tokens=0, head_reduce=head_reduce
    )
    span = Span(0, 0, 2, (1, 1, 2), 0)
    kept = gaze_reference(odds, key, torch.ones(1, 3, 1), [span], config, 1.0, torch.ones(3, dtype=torch.bool)).kept
    assert kept[:, :2].int().argmax(-1).tolist() == expected


def test_ties_go_to_the_lower_region() -> None:
    query = [0.0, 0.0]
    _, kept = attended(query, **COLUMNS, budget=1, periphery=False)
    assert kept == [True, False, True, False, True, True]


def test_few_visual_tokens_are_read_whole() -> None:
    settings = COLUMNS | {"budget": 1, "periphery": False}
    assert all(attended(QUERY, **settings | {"min_visual_tokens": 5})[1])
    assert not all(attended(QUERY, **settings | {"min_visual_tokens": 4})[1])


LAYOUTS = {
    "one image": [[[2, (1, 6, 6), 3]]],
    "odd": [[[1, (1, 5, 7), 1, (1, 1, 1), 2]]],
    "video and gaps": [[[(3, 4, 3), 1, (1, 5, 4, 1), 2]]],
    "no grid": [[[2, (63,), 1]]],
}


def dense(sequence: Any, kept: Tensor) -> Tensor:
    """`[B, H, D]` of the last position, over what is kept."""
    group = sequence.query.shape[1] // sequence.key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (sequence.key, sequence.value))
    return torch.nn.functional.scaled_dot_product_attention(
        sequence.query[:, :, -1:], key, value, attn_mask=kept[:, :, None], scale=sequence.scale
    )[:, :, 0]


@pytest.mark.parametrize("turns", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("periphery", [True, False], ids=["periphery", "bare"])
def test_the_whole_budget_is_plain_attention(turns: Any, periphery: bool, sequences: Callable[..., Any]) -> None:
    sequence = sequences(turns)
    config = GazeConfig(region=(4, 4, 1), window=(2, 2, 1), budget=1.0, periphery=periphery, min_visual_tokens=0)
    output, kept = sequence.reference(sequence.key.shape[2] - 1, config)
    assert kept.all()
    torch.testing.assert_close(output, dense(sequence, kept), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("turns", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("budget", [1, 0.3], ids=str)
@pytest.mark.parametrize("region", [(1, 1, 1), (4, 4, 2)], ids=str)
def test_a_periphery_of_single_tokens_is_plain_attention(
    turns: Any, budget: float, region: Any, sequences: Callable[..., Any]
) -> None:
    sequence = sequences(turns)
    config = GazeConfig(region=region, window=(1, 1, 1), budget=budget, periphery=True, min_visual_tokens=0)
    output, kept = sequence.reference(sequence.key.shape[2] - 1, config)
    assert not kept.all()
    torch.testing.assert_close(output, dense(sequence, torch.ones_like(kept)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("turns", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("head_reduce", ["mean", "none"])
def test_without_periphery_it_is_masked_attention(turns: Any, head_reduce: str, sequences: Callable[..., Any]) -> None:
    sequence = sequences(turns)
    config = GazeConfig(
        region=(2, 3, 1), window=None, budget=0.3, periphery=False, min_visual_tokens=0, head_reduce=head_reduce
    )
    output, kept = sequence.reference(sequence.key.shape[2] - 1, config)
    visual = [position for span in sequence.spans for position in span.positions()]
    share = kept[0, :, visual].float().mean().item()
    assert 0.1 < share < 0.6
    text = torch.ones(kept.shape[-1], dtype=torch.bool)
    text[visual] = False
    assert kept[0, :, text].all()
    torch.testing.assert_close(output, dense(sequence, kept), atol=1e-6, rtol=1e-5)


def test_hidden_entries_stay_hidden() -> None:
    visible = torch.tensor([True, True, True, True, False, True])
    key, value = torch.tensor([KEYS]), torch.tensor([VALUES])
    config = GazeConfig(**COLUMNS, budget=1, periphery=False)
    result = gaze_reference(torch.tensor([QUERY]), key, value, [IMAGE], config, SCALE, visible)
    assert result.kept[0].tolist() == [True, False, True, False, False, True]
    assert result.output[0].tolist() == average([(weight(QUERY, KEYS[i]), VALUES[i]) for i in (0, 2, 5)])


def test_a_sequence_without_images_is_plain_attention(sequences: Callable[..., Any]) -> None:
    sequence = sequences([[[35]]])
    output, kept = sequence.reference(35, GazeConfig())
    assert kept.all()
    torch.testing.assert_close(output, dense(sequence, kept), atol=1e-6, rtol=1e-5)
