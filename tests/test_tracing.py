"""What a trace holds, against the definition of gaze attention, and what it must not leave behind."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from sequences import BASE, LAYOUTS, SETTINGS, TURNS, Filled
from tiny import Case, batch, tiny

import gazepatch
from gazepatch.config import GazeConfig
from gazepatch.conformance import _spied
from gazepatch.errors import GazeError, PatchError
from gazepatch.layout import Span
from gazepatch.patch import patch_of
from gazepatch.tiling import region_cells, tile_span
from gazepatch.tracing import Read, Trace
from gazepatch.verification import fingerprint, generate_logits

SMALL = GazeConfig(region=(3, 3, 1), window=None, budget=0.25, min_visual_tokens=0)


def read_positions(trace: Trace, row: int, read: Read, spans: list[Span]) -> list[set[int]]:
    """Positions that each selection of a row read, cell by cell; `spans` say where those of the trace lie."""
    covered = {}
    for region in trace.regions[row]:
        span = spans[region.span]
        of_cells = torch.tensor(span.positions()).view(span.grid or (1, 1, span.tokens))
        box = [slice(a, b) for a, b in zip(region.start, region.stop, strict=True)]
        covered[region.number] = set(of_cells[tuple(box)].flatten().tolist())
        assert region.tokens == len(covered[region.number])
    chosen = [list(covered)] if read is None else read
    return [set().union(*(covered[number] for number in numbers)) for numbers in chosen]


@pytest.mark.parametrize("config", [BASE, replace(BASE, region=(2, 3, 2), window=None)], ids=["flat", "deep"])
@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 5, 7), (1, 8, 8), (3, 5, 7), None], ids=str)
def test_cells_are_those_of_the_tiling(grid: Any, config: GazeConfig) -> None:
    span = Span(0, 0, 35 if grid is None else grid[0] * grid[1] * grid[2], grid, 0)
    tiling, cells = tile_span(span, config), region_cells(span, config)
    raster = torch.arange(span.tokens).view(grid or (1, 1, 35))
    for tokens, (start, stop) in zip(tiling.order.split(tiling.lengths.tolist()), cells, strict=True):
        box = raster[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]
        assert sorted(tokens.tolist()) == box.flatten().tolist()


@torch.no_grad()
@pytest.mark.parametrize("settings", ["share", "number", "paper", "none", "few tokens in some rows", "everything"])
@pytest.mark.parametrize("turns", [*([layout] for layout in LAYOUTS.values()), *TURNS.values()], ids=[*LAYOUTS, *TURNS])
def test_layers_read_what_the_trace_says(turns: Any, settings: str, sequences: Callable[..., Any]) -> None:
    sequence, config = sequences(turns), replace(BASE, **SETTINGS[settings])
    filled, trace = Filled(sequence, config), Trace()
    for start, stop in zip(sequence.starts, sequence.stops, strict=True):
        filled.read(start, stop)
        decoded = filled.decode(stop, sequence.mask(stop))
        trace.follow(filled.state, sequence.rows, prompt=True)
        if decoded.selected is None:
            trace.add({0: None})
        else:
            plan = filled.state.plan(sequence.query[:, :, :1], filled.layer.entries())
            trace.add({0: plan.numbers(decoded.selected)})
        _, kept = sequence.reference(stop, config)
        share = 1 if config.head_reduce == "none" else 4
        for row, read in enumerate(trace.steps[0][0]):
            visual = [position for span in sequence.seen(row, stop) for position in span.positions()]
            expected = [{p for p in visual if of_head[p]} for of_head in kept[row, ::share]]
            found = read_positions(trace, row, read, trace.spans)
            assert expected == (found * len(expected) if read is None else found)
            reads = sum(map(len, expected)) / len(expected)
            assert trace.read_share(0, row) == pytest.approx(reads / len(visual) if visual else 0.0)


@pytest.mark.parametrize("settings", [{}, {"head_reduce": "none", "budget": 2}], ids=["share", "number for each head"])
@pytest.mark.parametrize("rows", ["one row", "two rows"])
@pytest.mark.parametrize("name", ["llava", "llava_next", "idefics3", "kimi_k25", "mistral3", "mllama", "qwen2_vl"])
def test_generate_reads_what_the_trace_says(name: str, rows: str, settings: dict[str, Any]) -> None:
    case = tiny(name) if rows == "one row" else batch(tiny(name))
    config = replace(SMALL, **settings)
    with gazepatch.patched(case.model, config), gazepatch.trace(case.model) as trace, _spied(case.model) as spied:
        generate_logits(case.model, case.inputs, 3)
    assert trace.settings == config and trace.spans == case.spans
    assert len(trace.steps) == 3 and len(spied) == 3 * len(trace.steps[0])
    for number, step in enumerate(spied):
        for row, read in enumerate(trace.steps[number // len(trace.steps[0])][step.layer]):
            own = [span for span in case.spans if span.row == row]
            kept = step.expected(row, config, own).kept
            share = 1 if config.head_reduce == "none" else len(kept) // step.key_heads
            visual = [position for span in own for position in span.positions()]
            expected = [{p for p in visual if of_head[p]} for of_head in kept[::share]]
            assert read is not None and expected == read_positions(trace, row, read, case.spans)
            budget = config.budget_regions(len(trace.regions[row]))
            assert {len(numbers) for numbers in read} == {budget}


@pytest.mark.parametrize("rows", ["one row", "two rows"])
@pytest.mark.parametrize(("name", "video"), [("llava_next", False), ("qwen2_vl", True)])
def test_context_tokens_move_nothing(name: str, video: bool, rows: str) -> None:
    case = tiny(name, video=video) if rows == "one row" else batch(tiny(name, video=video))
    tokens = torch.randn(2, 64)
    config = replace(SMALL, prefill="gaze", region=(3, 3, 2), window=(3, 3, 1))
    with gazepatch.patched(case.model, config, context_tokens=tokens), gazepatch.trace(case.model) as trace:
        generate_logits(case.model, case.inputs, 3)
        counted = gazepatch.stats(case.model)
    assert trace.spans == case.spans
    sizes = [{region.number: region.tokens for region in of_row} for of_row in trace.regions]
    assert [sum(of_row.values()) for of_row in sizes] == [
        sum(span.tokens for span in case.spans if span.row == row) for row in range(len(sizes))
    ]
    read = [
        sizes[row][number]
        for step in trace.steps
        for rows_of_layer in step.values()
        for row, selections in enumerate(rows_of_layer)
        for numbers in selections or []
        for number in numbers
    ]
    assert sum(read) == counted.read_entries < counted.visual_entries


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("settings", [{"budget": 1.0}, {"min_visual_tokens": 10_000}], ids=str)
def test_reading_everything_is_recorded_as_such(settings: dict[str, Any], cache: str) -> None:
    case = tiny("llava")
    with gazepatch.patched(case.model, SMALL, **settings), gazepatch.trace(case.model) as trace:
        case.model.generate(**case.inputs, max_new_tokens=3, min_new_tokens=3, cache_implementation=cache)
    assert trace.steps == [{0: [None], 1: [None]}] * 2
    assert trace.read_share(1) == trace.read_share(1, layer=0) == 1.0
    for asked, message in (
        ({"step": 9}, "a step below"),
        ({"step": 0, "row": 9}, "a row below"),
        ({"step": 0, "layer": 9}, "a layer that"),
    ):
        with pytest.raises(GazeError, match=f"expected {message}"):
            trace.read_share(**asked)
    assert sum(region.tokens for region in trace.regions[0]) == 128


def test_a_row_with_few_images_beside_one_with_many() -> None:
    case = batch(tiny("llava"))
    with gazepatch.patched(case.model, SMALL, min_visual_tokens=100), gazepatch.trace(case.model) as trace:
        generate_logits(case.model, case.inputs, 2)
    assert [len(of_row) for of_row in trace.regions] == [9, 18]
    for step in trace.steps:
        for few, many in step.values():
            assert few is None and many is not None
            assert all(len(numbers) == 5 for numbers in many)
    first, second = trace.to_dict(0), trace.to_dict(1)
    assert len(first["spans"]) == 1 and len(second["spans"]) == 2
    assert {region["span"] for region in first["regions"]} == {0}
    assert {region["span"] for region in second["regions"]} == {0, 1}
    assert json.loads(json.dumps(second)) == second
    assert first["steps"][0]["read_share"] == 1.0 and 0.2 < second["steps"][0]["read_share"] < 0.35
    with pytest.raises(GazeError, match="expected a row below 2"):
        trace.to_dict(2)


def test_text_alone_has_no_steps() -> None:
    case = tiny("llava")
    text = {"input_ids": torch.tensor([[1, 5, 7, 9]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with gazepatch.patched(case.model, SMALL), gazepatch.trace(case.model) as trace:
        generate_logits(case.model, text, 2)
    assert trace.steps == [] and trace.spans == [] and trace.to_dict()["regions"] == []
    assert Trace().to_dict() == {"settings": None, "spans": [], "regions": [], "steps": []}


def test_a_prompt_starts_again_and_a_trace_can_join_later() -> None:
    case = tiny("llava")
    with gazepatch.patched(case.model, SMALL):
        with gazepatch.trace(case.model) as whole:
            generate_logits(case.model, case.inputs, 5)
            _, tokens = generate_logits(case.model, case.inputs, 3)
        assert len(whole.steps) == 3
        ids = case.inputs["input_ids"]
        with torch.no_grad():
            out = case.model(**case.inputs)
            with gazepatch.trace(case.model) as joined:
                for step in range(2):
                    mask = torch.ones(1, ids.shape[1] + step + 1, dtype=torch.long)
                    out = case.model(
                        tokens[:, step : step + 1], attention_mask=mask, past_key_values=out.past_key_values
                    )
    assert joined.steps == whole.steps[:2] and joined.regions == whole.regions


def test_rows_that_change_are_refused() -> None:
    case = tiny("llava")
    with torch.no_grad(), gazepatch.patched(case.model, SMALL), gazepatch.trace(case.model):
        cache = case.model(**case.inputs).past_key_values
        cache.batch_repeat_interleave(2)
        with pytest.raises(GazeError, match="expected the 1 rows of the prompt in every step, got 2"):
            case.model(torch.tensor([[5], [6]]), past_key_values=cache)


def test_nothing_is_left_and_nothing_changes() -> None:
    case = tiny("llava")
    generate_logits(case.model, case.inputs, 1)
    gazepatch.apply(case.model, SMALL)
    before, logits = fingerprint(case.model), generate_logits(case.model, case.inputs, 3)[0]
    with gazepatch.trace(case.model) as trace:
        assert torch.equal(generate_logits(case.model, case.inputs, 3)[0], logits)
    assert patch_of(case.model).runtime.running.trace is None
    assert fingerprint(case.model) == before
    generate_logits(case.model, case.inputs, 5)
    assert len(trace.steps) == 3


def test_an_exception_takes_the_trace_away(monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny("llava")
    gazepatch.apply(case.model, SMALL)
    attention, calls = patch_of(case.model).attention, []
    decode = attention.decode

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 4:  # the second layer of the second step
            raise ZeroDivisionError
        return decode(*args)

    with pytest.raises(ZeroDivisionError), monkeypatch.context() as patch, gazepatch.trace(case.model) as trace:
        patch.setattr(attention, "decode", failing)
        generate_logits(case.model, case.inputs, 3)
    assert len(trace.steps) == 1 and list(trace.steps[0]) == [0, 1]
    assert patch_of(case.model).runtime.running.trace is None
    with gazepatch.trace(case.model) as again:
        generate_logits(case.model, case.inputs, 3)
    assert again.steps[:1] == trace.steps


def test_one_trace_of_a_patched_model_at_a_time() -> None:
    case = tiny("llava")
    with pytest.raises(PatchError, match="not patched"), gazepatch.trace(case.model):
        pass
    with gazepatch.patched(case.model, SMALL), gazepatch.trace(case.model):
        with pytest.raises(PatchError, match="one trace of this model at a time"), gazepatch.trace(case.model):
            pass
        assert patch_of(case.model).runtime.running.trace is not None


def traced(case: Case, steps: int = 3) -> Trace:
    with gazepatch.trace(case.model) as trace:
        generate_logits(case.model, case.inputs, steps)
    return trace


def test_two_models_traced_at_once_do_not_see_each_other() -> None:
    cases = [tiny("llava"), tiny("qwen2_vl")]
    for case in cases:
        gazepatch.apply(case.model, SMALL)
    alone = [traced(case).to_dict() for case in cases]
    with gazepatch.trace(cases[0].model) as first, gazepatch.trace(cases[1].model) as second:
        for case in cases:
            generate_logits(case.model, case.inputs, 3)
    assert [first.to_dict(), second.to_dict()] == alone


def test_overlapping_traces_leave_compiled_code_in_use() -> None:
    first, second = (tiny("llava").model for _ in range(2))
    compiled: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append("made")
        return graph.forward

    with gazepatch.patched(first, SMALL), gazepatch.patched(second, SMALL):
        one, other = gazepatch.trace(first), gazepatch.trace(second)
        one.__enter__()
        other.__enter__()
        one.__exit__(None, None, None)
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
        assert not compiled
        other.__exit__(None, None, None)
    torch.compile(lambda x: x + 2, backend=backend)(torch.ones(2))
    assert compiled == ["made"]


def test_two_threads_traced_at_once_do_not_see_each_other() -> None:
    case = tiny("llava")
    cases = [case, replace(case, inputs=tiny("llava", seed=3).inputs)]
    gazepatch.apply(case.model, SMALL)
    alone = [traced(one).steps for one in cases]
    assert alone[0] != alone[1]
    together: list[Any] = [None, None]

    def run(place: int) -> None:
        together[place] = traced(cases[place]).steps

    threads = [threading.Thread(target=run, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_beams_are_rows() -> None:
    case = tiny("llava")
    with gazepatch.patched(case.model, SMALL), gazepatch.trace(case.model) as trace:
        case.model.generate(**case.inputs, max_new_tokens=4, num_beams=3)
    assert len(trace.regions) == 3 and all(len(rows) == 3 for step in trace.steps for rows in step.values())
