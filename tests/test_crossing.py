"""Images that are the keys of cross-attention layers (Llama 3.2 Vision), against the model with plain gaze attention.

`plainly` puts a definition of its own, written here for tiles of 6 x 6 keys, under an unpatched model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
import transformers
from tiny import IMAGE, Case, batch, built, filled, tiny
from tiny.crossing import ROOM, SIDE, TILE, seen_behind, tiled, tiles_of
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface
from transformers.models.mllama import processing_mllama
from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention, eager_attention_forward

import gazepatch
from gazepatch.config import GazeConfig
from gazepatch.context import initial_context_tokens
from gazepatch.errors import CacheError, UnsupportedModelError
from gazepatch.layout import Span
from gazepatch.patch import patched, stats
from gazepatch.registry import adapter_for
from gazepatch.verification import generate_logits, verify

WHOLE = GazeConfig(region=(3, 3, 1), window=(3, 1, 1), budget=1.0, periphery=False, min_visual_tokens=0)
QUARTER = replace(WHOLE, budget=0.25)
FAR = replace(QUARTER, periphery=True)
TEXT = ("input_ids", "attention_mask")


# ---- the definition


def regions_of(tile: int) -> list[list[list[int]]]:
    """For every 3 x 3 region of a tile, its windows of three keys above each other."""
    first = tile * TILE + 1
    corners = [(y, x) for y in (0, 3) for x in (0, 3)]
    return [[[first + (y + i) * SIDE + x + j for i in range(3)] for j in range(3)] for y, x in corners]


def attended(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float, config: GazeConfig) -> Tensor:
    """One query `[H, D]` over keys `[H_kv, L, D]`, of which it sees `[L]`."""
    outputs = []
    regions = [r for tile in range(key.shape[1] // TILE) if seen[tile * TILE + 1] for r in regions_of(tile)]
    for k, queries in enumerate(query.unflatten(0, (len(key), -1))):
        means = [[(key[k][w].mean(0), value[k][w].mean(0)) for w in windows] for windows in regions]
        logits = [[scale * queries @ mean + math.log(3) for mean, _ in windows] for windows in means]
        scores = torch.stack([torch.stack(windows).logsumexp(0) for windows in logits]).softmax(0).mean(1)
        chosen = scores.argsort(descending=True, stable=True)[: math.ceil(config.budget * len(regions))].tolist()
        reads, far = seen.clone(), []
        for number, windows in enumerate(regions):
            if number not in chosen:
                reads[list(chain(*windows))] = False
                far += [(x, mean[1]) for x, mean in zip(logits[number], means[number], strict=True)]
        weights = [scale * queries @ key[k][reads].T, *(x[:, None] for x, _ in far if config.periphery)]
        values = [value[k][reads], *(mean[None] for _, mean in far if config.periphery)]
        outputs.append(torch.cat(weights, 1).softmax(1) @ torch.cat(values))
    return torch.cat(outputs)


@contextmanager
def plainly(model: Any, config: GazeConfig, prompts: bool = False) -> Iterator[None]:
    """The unpatched model with plain gaze attention in its cross-attention layers, in decode steps and in `prompts`."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **rest: Any) -> Any:
        gazes = isinstance(module, MllamaTextCrossAttention) and (prompts or query.shape[2] == 1)
        if not gazes:
            return eager_attention_forward(module, query, key, value, mask, **rest)
        seen = torch.ones(len(query), query.shape[2], key.shape[2], dtype=torch.bool)
        seen = seen if mask is None else (mask[:, 0] == 0).expand_as(seen)
        made = [
            torch.stack([attended(q[:, i], k, v, s[i], rest["scaling"], config) for i in range(q.shape[1])])
            for q, k, v, s in zip(query, key, value, seen, strict=True)
        ]
        return torch.stack(made), None

    name, settings = "plain_gaze", model.model.language_model.config
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, eager_mask)
    before, settings._attn_implementation_internal = settings._attn_implementation, name
    try:
        yield
    finally:
        settings._attn_implementation_internal = before
        del AttentionInterface._global_mapping[name], AttentionMaskInterface._global_mapping[name]


# ---- prompts


def by_the_processor(ids: Tensor, rows: Any) -> dict[str, Tensor]:
    """The mask as transformers' processor makes it: the words behind an image see it up to the next one."""
    sparse = [processing_mllama.get_cross_attention_token_mask(row.tolist(), IMAGE) for row in ids]
    tiles = [[tiles_of(image) for image in row] for row in rows]
    dense = processing_mllama.convert_sparse_cross_attention_mask_to_dense(sparse, tiles, ROOM, ids.shape[1])
    return {"cross_attention_mask": torch.from_numpy(dense)}


def with_rows(*rows: list[Any], mask: Any = seen_behind) -> Case:
    """The model with other images; a row without any gets one of nothing, as the processor pads it."""
    case = filled(replace(built("mllama"), rows=[row or [tiled(1, 1)] for row in rows], extra=lambda ids, rows: {}))
    ids, most = case.inputs["input_ids"], max(map(len, rows))
    for number, row in enumerate(rows):
        if not row:
            ids[number, ids[number] == IMAGE] = 5
            case.inputs["pixel_values"][number] = 0
            case.inputs["aspect_ratio_ids"][number] = 0
    for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        assert case.inputs[name].shape[1] == most
    case.inputs.update(mask(ids, rows))
    return case


@pytest.fixture
def case() -> Case:
    return built("mllama")


CASES: dict[str, Callable[[], Case]] = {
    "two images": lambda: built("mllama"),
    "the last of two images": lambda: with_rows([tiled(7, 3), tiled(2, 2)], mask=by_the_processor),
    "all tiles": lambda: with_rows([tiled(6, 4)]),
    "different numbers of images": lambda: batch(built("mllama")),
    "a row without an image": lambda: with_rows([], [tiled(2, 2)]),
}
every_case = pytest.mark.parametrize("name", CASES)


def close(actual: Tensor, expected: Tensor) -> None:
    error = (actual - expected).abs().max().item()
    assert error <= 2e-5 * max(1.0, expected.abs().max().item()), error


# ---- what is read


@every_case
@pytest.mark.parametrize("config", [QUARTER, FAR], ids=["alone", "periphery"])
def test_steps_read_what_the_definition_says(name: str, config: GazeConfig) -> None:
    case = CASES[name]()
    dense, tokens = generate_logits(case.model, case.inputs, 3)
    with plainly(case.model, config):
        expected, _ = generate_logits(case.model, case.inputs, 3, tokens)
    with patched(case.model, config):
        gazing, _ = generate_logits(case.model, case.inputs, 3, tokens)
    close(gazing, expected)
    assert torch.equal(gazing[:, 0], dense[:, 0])
    assert (gazing - dense).abs().max() > 1e-2


@every_case
def test_a_full_budget_is_dense(name: str) -> None:
    case = CASES[name]()
    dense, tokens = generate_logits(case.model, case.inputs, 4)
    with patched(case.model, WHOLE):
        whole, same = generate_logits(case.model, case.inputs, 4)
        assert stats(case.model).read_share == 1.0
    assert torch.equal(tokens, same)
    close(whole, dense)


@torch.no_grad()
@every_case
@pytest.mark.parametrize(("config", "cached"), [(QUARTER, True), (FAR, False)], ids=["cached", "uncached-periphery"])
def test_prompts_that_gaze(name: str, config: GazeConfig, cached: bool) -> None:
    case = CASES[name]()
    with plainly(case.model, config, prompts=True):
        expected = case.model(**case.inputs, use_cache=cached).logits
    with patched(case.model, config, prefill="gaze"):
        gazing = case.model(**case.inputs, use_cache=cached).logits
    kept = case.inputs["attention_mask"].bool()
    close(gazing[kept], expected[kept])
    assert (gazing - case.model(**case.inputs).logits)[kept].abs().max() > 1e-2


@torch.no_grad()
def test_without_a_mask_everything_is_seen(case: Case) -> None:
    inputs = {name: value for name, value in case.inputs.items() if name != "cross_attention_mask"}
    with plainly(case.model, QUARTER, prompts=True):
        expected = case.model(**inputs).logits
    with patched(case.model, QUARTER, prefill="gaze"):
        close(case.model(**inputs).logits, expected)
        generate_logits(case.model, inputs, 1)
        assert stats(case.model).visual_entries == 2 * 2 * 2 * ROOM * SIDE * SIDE  # layers, key heads, images


def test_a_prompt_of_one_token_is_a_prompt() -> None:
    case = with_rows([tiled(2, 2)])
    ids = torch.tensor([[IMAGE]])
    inputs = {**case.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["cross_attention_mask"] = case.inputs["cross_attention_mask"][:, -1:]
    dense, tokens = generate_logits(case.model, inputs, 2)
    with plainly(case.model, QUARTER, prompts=False), torch.no_grad():
        assert not torch.equal(case.model(**inputs).logits[:, -1], dense[:, 0])  # plain gaze goes by the length alone
    with patched(case.model, QUARTER):
        gazing, _ = generate_logits(case.model, inputs, 2, tokens)
        assert stats(case.model).steps == 2
    assert torch.equal(gazing[:, 0], dense[:, 0])


def test_features_come_tile_by_tile_and_row_by_row() -> None:
    case = with_rows([tiled(6, 4)])
    tower, cells = case.model.model.vision_model, [(t, y, x) for t in range(4) for y in range(6) for x in range(6)]
    inputs = {name: case.inputs[name] for name in ("aspect_ratio_ids", "aspect_ratio_mask")}

    @torch.no_grad()
    def keys(picture: Tensor) -> Tensor:
        return tower(pixel_values=picture, **inputs).last_hidden_state.flatten(0, 3)

    picture, hits = case.inputs["pixel_values"], 0
    for tile, y, x in cells:
        changed = picture.clone()
        changed[0, 0, tile, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] *= -1
        moved = int((keys(changed) - keys(picture)).norm(dim=-1).argmax())
        hits += moved == tile * TILE + 1 + y * SIDE + x
    assert hits / len(cells) > 0.4


# ---- what is said of it


def test_layers_that_gaze_and_reasons(case: Case) -> None:
    report = gazepatch.inspect(case.model, case.inputs)
    assert report.gaze_layers == [1, 3]
    assert report.reasons == dict.fromkeys((0, 2), "self-attention layer: its keys are text")
    assert report.spans == case.spans
    with patched(case.model, QUARTER, dense_layers=(1,)):
        generate_logits(case.model, case.inputs, 2)
        assert list(stats(case.model).layers) == [3]
    with pytest.raises(UnsupportedModelError, match=r"none of the 4 layers.*its keys are text"):
        gazepatch.apply(case.model, QUARTER, dense_layers=(1, 3))


def test_spans_of_a_row_without_an_image() -> None:
    case = with_rows([], [tiled(2, 2)])
    assert [(span.row, span.start, span.tile) for span in gazepatch.inspect(case.model, case.inputs).spans] == [
        (1, 1, 0),
        (1, 1 + TILE, 1),
    ]
    adapter = adapter_for("mllama")
    assert adapter.cross_spans(case.model.config, 3) == [Span(0, 0, 3, None, 0)]
    assert adapter.locate(case.model.config, [[1, 2]], {}) == []


def test_counts_by_hand() -> None:
    """Two images of three and two tiles, of which an answer sees the last: 2 x 36 keys, 8 regions, 2 of them read."""
    case = CASES["the last of two images"]()
    with patched(case.model, QUARTER):
        generate_logits(case.model, case.inputs, 5)
        counted = stats(case.model)
    assert counted.steps == 5
    for layer in (1, 3):
        assert counted.layers[layer].visual_entries == 5 * 2 * 72  # steps, key heads
        assert counted.layers[layer].read_entries == 5 * 2 * 2 * 9
    assert counted.read_share == 0.25 and counted.context_entries == 0


def test_a_row_that_sees_nothing_sees_everything_as_in_transformers() -> None:
    case = CASES["a row without an image"]()
    with patched(case.model, QUARTER), gazepatch.trace(case.model) as trace:
        generate_logits(case.model, case.inputs, 1)
        counted = stats(case.model).layers[1]
    assert counted.visual_entries == 2 * (ROOM * 36 + 2 * 36) and counted.read_entries == 2 * (4 + 2) * 9
    assert [len(regions) for regions in trace.regions] == [4 * ROOM, 4 * 2]


def test_few_visible_keys_are_read_whole() -> None:
    case = CASES["the last of two images"]()
    dense, tokens = generate_logits(case.model, case.inputs, 3)
    most = ROOM * 2 * SIDE * SIDE  # seen by the words before the images, whose mask is lifted
    for prefill, least in (("dense", 73), ("gaze", most + 1)):
        with patched(case.model, QUARTER, min_visual_tokens=least, prefill=prefill):
            close(generate_logits(case.model, case.inputs, 3, tokens)[0][:, 1:], dense[:, 1:])
            assert stats(case.model).read_share == 1.0
    with patched(case.model, QUARTER, min_visual_tokens=72):
        generate_logits(case.model, case.inputs, 3)
        assert stats(case.model).read_share == 0.25


def test_a_trace_numbers_the_regions_that_are_seen() -> None:
    case = CASES["the last of two images"]()
    with patched(case.model, QUARTER), gazepatch.trace(case.model) as trace:
        generate_logits(case.model, case.inputs, 2)
    assert [(span.media, span.tile) for span in trace.spans] == [(1, 0), (1, 1)]
    assert [region.number for region in trace.regions[0]] == list(range(4 * ROOM, 4 * ROOM + 8))
    for step in trace.steps:
        for (read,) in step.values():
            assert read is not None and [len(numbers) for numbers in read] == [2, 2]
            assert all(4 * ROOM <= number < 4 * ROOM + 8 for numbers in read for number in numbers)
    assert trace.read_share(0) == 0.25
    assert trace.to_dict()["spans"][0]["start"] == ROOM * TILE + 1


def test_context_tokens_have_no_place(case: Case) -> None:
    with pytest.raises(UnsupportedModelError, match=r"no token of the sequence stands there.*context_tokens=0"):
        gazepatch.apply(case.model, QUARTER, context_tokens=initial_context_tokens(case.model, 2))


# ---- caches


class Talk:
    """A conversation by hand on one cache: `say` returns the logits of its tokens."""

    def __init__(self, case: Case) -> None:
        self.case, self.cache, self.ids = case, transformers.DynamicCache(), torch.zeros(1, 0, dtype=torch.long)

    @torch.no_grad()
    def say(self, ids: Tensor, images: Any = (), mask: Tensor | None = None) -> Tensor:
        self.ids = torch.cat([self.ids, ids], 1)
        pixels = {}
        for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask") if images else ():
            pixels[name] = torch.cat([image.inputs[name] for image in images])[None]
        seen = {} if mask is None else {"cross_attention_mask": mask[:, : self.ids.shape[1]]}
        attention = torch.ones_like(self.ids)
        model = self.case.model
        return model(input_ids=ids, attention_mask=attention, past_key_values=self.cache, **pixels, **seen).logits


def talk(case: Case, steps: int = 2) -> Tensor:
    """Two turns with an image each, and single tokens behind both."""
    images, said = [tiled(2, 2), tiled(7, 3)], Talk(case)
    turns = [torch.tensor([[1, 5, IMAGE, 6, 7]]), torch.tensor([[8, IMAGE, 9, 10, 11]])]
    whole = torch.cat([part for turn in turns for part in (turn, torch.full((1, steps), 20))], 1)
    mask = seen_behind(whole, [images])["cross_attention_mask"]
    logits = []
    for number, turn in enumerate(turns):
        seen = mask[:, :, : number + 1]
        logits.append(said.say(turn, images[number : number + 1], seen))
        logits += [said.say(torch.tensor([[20]]), (), seen) for _ in range(steps)]
    return torch.cat(logits, 1)


@pytest.mark.parametrize("config", [QUARTER, FAR], ids=["alone", "periphery"])
def test_a_later_turn_brings_an_image(case: Case, config: GazeConfig) -> None:
    torch.manual_seed(1)
    dense = talk(case)
    torch.manual_seed(1)
    with patched(case.model, WHOLE):
        close(talk(case), dense)
    for prefill in ("dense", "gaze"):
        torch.manual_seed(1)
        with plainly(case.model, config, prompts=prefill == "gaze"):
            expected = talk(case)
        torch.manual_seed(1)
        with patched(case.model, config, prefill=prefill):
            close(talk(case), expected)


def test_a_later_turn_of_words(case: Case) -> None:
    def turns() -> Tensor:
        first = case.model.generate(**case.inputs, max_new_tokens=3, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.tensor([[30, 31, 32]])], 1)
        mask = case.inputs["cross_attention_mask"]
        mask = torch.cat([mask, mask[:, -1:].expand(-1, ids.shape[1] - mask.shape[1], -1, -1)], 1)
        texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "cross_attention_mask": mask}
        return case.model.generate(**texts, past_key_values=first.past_key_values, max_new_tokens=4)

    dense = turns()
    with patched(case.model, WHOLE):
        assert torch.equal(turns(), dense)
    with plainly(case.model, QUARTER):
        expected = turns()
    with patched(case.model, QUARTER):
        assert torch.equal(turns(), expected)
    assert not torch.equal(expected, dense)


def test_words_then_an_image(case: Case) -> None:
    def turns() -> Tensor:
        said, image = Talk(case), tiled(2, 2)
        logits = [said.say(torch.tensor([[1, 5, 6, 7]])), said.say(torch.tensor([[8]]))]
        mask = seen_behind(torch.tensor([[1, 5, 6, 7, 8, IMAGE, 9, 10]]), [[image]])["cross_attention_mask"]
        logits.append(said.say(torch.tensor([[IMAGE, 9]]), [image], mask))
        return torch.cat([*logits, said.say(torch.tensor([[10]]), (), mask)], 1)

    torch.manual_seed(2)
    with plainly(case.model, QUARTER):
        expected = turns()
    torch.manual_seed(2)
    with patched(case.model, QUARTER):
        close(turns(), expected)
        assert stats(case.model).steps == 1


def test_a_mask_may_change_from_step_to_step(case: Case) -> None:
    ids, mask = case.inputs["input_ids"], case.inputs["cross_attention_mask"]
    rows = [mask[:, -1:].clone() for _ in range(4)]
    rows[1][:, :, 0], rows[2][:, :, 1], rows[3][:, :, 1, 0] = 0, 0, 0
    mask = torch.cat([mask, *rows], 1)

    def steps() -> Tensor:
        said = Talk(case)
        said.say(ids, case.rows[0], mask)
        return torch.cat([said.say(torch.tensor([[20 + i]]), (), mask) for i in range(4)], 1)

    for config in (QUARTER, FAR):
        with plainly(case.model, config):
            expected = steps()
        with patched(case.model, config), gazepatch.trace(case.model) as trace:
            close(steps(), expected)
            entries = stats(case.model).layers[1].visual_entries
        assert entries == 2 * 36 * (5 + 3 + 2 + 4)
        # Where other images are seen than before, the trace starts again.
        assert len(trace.steps) == 1 and [(s.media, s.tile) for s in trace.spans] == [(0, 0), (0, 1), (1, 1), (1, 2)]


def test_text_alone_is_as_if_unpatched(case: Case) -> None:
    texts = {"input_ids": torch.tensor([[1, 5, 7, 9]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    dense = generate_logits(case.model, texts, 4)[0]
    with patched(case.model, QUARTER):
        assert torch.equal(generate_logits(case.model, texts, 4)[0], dense)
        assert stats(case.model).steps == 0


@pytest.mark.parametrize("rows", ["one row", "two rows"])
def test_beam_search(case: Case, rows: str) -> None:
    case = case if rows == "one row" else CASES["different numbers of images"]()
    search = {"num_beams": 3, "max_new_tokens": 5, "output_scores": True, "return_dict_in_generate": True}
    dense = case.model.generate(**case.inputs, **search)
    with patched(case.model, WHOLE):
        assert torch.equal(case.model.generate(**case.inputs, **search).sequences, dense.sequences)
    with plainly(case.model, FAR):
        expected = case.model.generate(**case.inputs, **search)
    with patched(case.model, FAR):
        found = case.model.generate(**case.inputs, **search)
    assert torch.equal(found.sequences, expected.sequences)
    close(found.sequences_scores, expected.sequences_scores)


def test_guesses_that_are_taken_back_leave_the_images(case: Case) -> None:
    """Which transformers' own cache forgets a part of (5.23)."""
    greedy = case.model.generate(**case.inputs, max_new_tokens=6)
    with patched(case.model, WHOLE):
        guessed = case.model.generate(**case.inputs, max_new_tokens=6, prompt_lookup_num_tokens=2)
    assert torch.equal(guessed, greedy)


def test_rows_of_a_cache() -> None:
    """Two rows that see different images change places, then one of them goes on alone, twice."""
    pair = CASES["different numbers of images"]()
    mask = pair.inputs["cross_attention_mask"][:, -1:]
    with patched(pair.model, QUARTER), torch.no_grad():
        prompt = pair.model(**pair.inputs)

        def step(cache: Any, rows: list[int]) -> Tensor:
            attention = torch.cat([pair.inputs["attention_mask"][rows], torch.ones(len(rows), 1, dtype=torch.long)], 1)
            texts = {"input_ids": torch.full((len(rows), 1), 20), "attention_mask": attention}
            return pair.model(**texts, past_key_values=cache, cross_attention_mask=grown(rows)).logits

        def grown(rows: list[int]) -> Tensor:
            return torch.cat([pair.inputs["cross_attention_mask"], mask], 1)[rows]

        cache = prompt.past_key_values
        expected = step(cache, [0, 1])
        cache.crop(-1)
        cache.reorder_cache(torch.tensor([1, 0]))
        close(step(cache, [1, 0]), expected[[1, 0]])
        cache.crop(-1)
        cache.batch_select_indices(torch.tensor([0]))
        cache.batch_repeat_interleave(2)
        close(step(cache, [1, 1]), expected[[1, 1]])


def test_two_models_and_two_caches_share_nothing() -> None:
    first, second = tiny("mllama"), tiny("mllama", seed=5)
    alone = []
    for each in (first, second):
        with patched(each.model, QUARTER):
            alone.append(generate_logits(each.model, each.inputs, 2))
    with patched(first.model, QUARTER), patched(second.model, FAR, budget=0.5), torch.no_grad():
        talks = [Talk(first), Talk(first)]
        for one, said in zip((first, second), talks, strict=True):  # other images in each
            mask = one.inputs["cross_attention_mask"]
            said.say(one.inputs["input_ids"], one.rows[0], torch.cat([mask, mask[:, -1:]], 1))
            generate_logits(second.model, second.inputs, 1)
        token = alone[0][1][:, :1]
        mask = first.inputs["cross_attention_mask"]
        mask = torch.cat([mask, mask[:, -1:]], 1)
        close(talks[0].say(token, (), mask)[:, -1], alone[0][0][:, 1])
        with pytest.raises(CacheError, match="another model"):
            second.model(input_ids=token, past_key_values=talks[0].cache)
    with pytest.raises(CacheError):
        first.model(input_ids=token, past_key_values=talks[1].cache)


def test_a_cache_is_emptied_and_used_again(case: Case) -> None:
    with patched(case.model, QUARTER), torch.no_grad():
        cache = transformers.DynamicCache()
        expected = case.model(**case.inputs, past_key_values=cache).logits
        layer = cache.layers[1]
        assert layer.keys.shape[2] == layer.values.shape[2] == layer.get_seq_length() == 2 * ROOM * TILE
        assert cache.get_seq_length() == case.inputs["input_ids"].shape[1]
        cache.reset()
        assert cache.get_seq_length() == 0 and layer.keys is None
        assert torch.equal(case.model(**case.inputs, past_key_values=cache).logits, expected)


def test_keys_are_copied_once() -> None:
    """A decode step adds nothing to what a cross-attention layer holds, and hands out no copy of it."""
    case = CASES["all tiles"]()
    with patched(case.model, FAR), torch.no_grad():
        cache = transformers.DynamicCache()
        prompt = case.model(**case.inputs, past_key_values=cache)
        held = [tensor.data_ptr() for tensor in cache.layers[1].entries()]
        ids = prompt.logits[:, -1:].argmax(-1)
        mask = case.inputs["cross_attention_mask"]
        attention = torch.cat([case.inputs["attention_mask"], torch.ones_like(ids)], 1)
        seen = torch.cat([mask, mask[:, -1:]], 1)
        case.model(input_ids=ids, attention_mask=attention, cross_attention_mask=seen, past_key_values=cache)
        assert [tensor.data_ptr() for tensor in cache.layers[1].entries()] == held


# ---- all the rest


def test_verify_by_kind_of_attention() -> None:
    case = tiny("mllama")
    for kind, attention in ((torch.float32, "sdpa"), (torch.float32, "eager"), (torch.bfloat16, "sdpa")):
        case.model.to(kind).set_attn_implementation(attention)
        inputs = {**case.inputs, "pixel_values": case.inputs["pixel_values"].to(kind)}
        with patched(case.model, FAR):
            report = verify(case.model, inputs)
        assert report.passed, report


@torch.no_grad()
def test_in_float16_a_hidden_tile_is_hidden() -> None:
    """Whose least number is not as little as that of other types."""
    case = tiny("mllama")
    case.model.half()
    changed = {**case.inputs, "pixel_values": case.inputs["pixel_values"].half()}
    keys = case.model.model.vision_model(**{k: changed[k] for k in changed if k.startswith(("pixel", "aspect"))})
    states = case.model.model.multi_modal_projector(keys.last_hidden_state).flatten(0, 2)
    texts = {name: case.inputs[name] for name in TEXT}
    texts["cross_attention_mask"] = case.inputs["cross_attention_mask"][:, -1:].expand(-1, 18, -1, -1)
    other = states.clone()
    other.view(2, ROOM, TILE, -1)[0, 2:] = other.view(2, ROOM, TILE, -1)[1, 0]  # tiles that nobody sees
    for prefill in ("dense", "gaze"):
        with patched(case.model, FAR, prefill=prefill):
            found = [case.model(**texts, cross_attention_states=each).logits[0, -1] for each in (states, other)]
        assert torch.equal(*found)


def test_gradient_checkpointing() -> None:
    case = tiny("mllama")
    case.model.train()

    def gradients() -> list[Tensor]:
        case.model.zero_grad()
        case.model(**case.inputs, labels=case.inputs["input_ids"]).loss.backward()
        return [p.grad.clone() for p in case.model.parameters() if p.grad is not None]

    dense = gradients()
    with patched(case.model, QUARTER, prefill="gaze"):
        plain = gradients()
        case.model.gradient_checkpointing_enable()
        again = gradients()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, again, strict=True))
    assert not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, dense, strict=True))
