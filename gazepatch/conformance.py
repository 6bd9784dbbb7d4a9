"""What every adapter must fulfil, as a test class that other packages inherit.

    from gazepatch.conformance import AdapterConformance, Case

    class TestMyFamily(AdapterConformance):
        @pytest.fixture
        def case(self):
            return Case(model, inputs, spans)

`inputs` are what the family's processor returns for a prompt with images (one row or several, padded on the left);
`spans` say, independently of the adapter, where their visual tokens are; in families whose images are the keys of
cross-attention, where they are among these, and an answer must see them all. The model may be tiny and random, and must
be in evaluation mode.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gazepatch.config import GazeConfig
from gazepatch.context import initial_context_tokens
from gazepatch.errors import UnsupportedModelError
from gazepatch.inspection import inspect
from gazepatch.layout import Span
from gazepatch.patch import patch_of, patched, root_model, stats
from gazepatch.reference import Attended, gaze_reference
from gazepatch.registry import adapter_for
from gazepatch.score_mod import ScoreMod, visible
from gazepatch.verification import fingerprint, generate_logits, verify

#: Largest difference from the dense logits, float32, relative to the largest logit.
TOLERANCE = 2e-5
#: Settings that leave nothing to chance: small regions, windows inside them, edges that do not fit.
WHOLE = GazeConfig(region=(3, 3, 2), window=(3, 1, 1), budget=1.0, periphery=False, min_visual_tokens=0)
QUARTER = dataclasses.replace(WHOLE, budget=0.25)


class CaseLike(Protocol):
    """A model, inputs for it, and the spans they hold."""

    @property
    def model(self) -> Any: ...
    @property
    def inputs(self) -> Mapping[str, Any]: ...
    @property
    def spans(self) -> Sequence[Span]: ...


@dataclasses.dataclass(frozen=True)
class Case:
    """The plainest `CaseLike`."""

    model: nn.Module
    inputs: Mapping[str, Any]
    spans: Sequence[Span]


class AdapterConformance:
    """Inherit, and give a fixture `case`."""

    def test_spans_are_where_the_processor_put_them(self, case: CaseLike) -> None:
        assert inspect(case.model, case.inputs).spans == list(case.spans)

    def test_generate_finds_the_same_spans(self, case: CaseLike) -> None:
        with patched(case.model, WHOLE), _spied(case.model) as steps:
            generate_logits(case.model, case.inputs, 1)
            visual = stats(case.model).visual_entries
        assert sorted(step.layer for step in steps) == inspect(case.model).gaze_layers
        assert visual == sum(span.tokens for span in case.spans) * sum(step.key_heads for step in steps)

    def test_full_budget_generates_the_dense_tokens(self, case: CaseLike) -> None:
        dense, tokens = generate_logits(case.model, case.inputs, 16)
        with patched(case.model, WHOLE):
            whole, same = generate_logits(case.model, case.inputs, 16)
            assert stats(case.model).read_share == 1.0
        assert torch.equal(tokens, same)
        _assert_close(whole, dense)

    def test_full_budget_forward_and_loss_are_dense(self, case: CaseLike) -> None:
        ids, words = case.inputs["input_ids"], case.model.config.get_text_config(decoder=True).vocab_size
        labels = ids.masked_fill((case.inputs["attention_mask"] == 0) | (ids >= words), -100)
        with torch.no_grad():
            for use_cache in (True, False):
                dense = case.model(**case.inputs, labels=labels, use_cache=use_cache)
                for prefill in ("dense", "gaze"):
                    with patched(case.model, WHOLE, prefill=prefill):
                        whole = case.model(**case.inputs, labels=labels, use_cache=use_cache)
                    kept = case.inputs["attention_mask"].bool()
                    _assert_close(whole.logits[kept], dense.logits[kept])
                    assert abs(float(whole.loss - dense.loss)) <= TOLERANCE * max(1.0, float(dense.loss))

    def test_decode_equals_the_reference(self, case: CaseLike) -> None:
        for settings in (QUARTER, dataclasses.replace(QUARTER, periphery=True, head_reduce="none")):
            with patched(case.model, settings), _spied(case.model) as steps:
                generate_logits(case.model, case.inputs, 3)
                assert steps, "no step gazed"
                read = sum(step.check(settings, case.spans) for step in steps)
                counted = stats(case.model)
            assert counted.read_entries == read
            assert 0 < counted.read_share < 1

    def test_promises_of_verify(self, case: CaseLike) -> None:
        if len(case.inputs["input_ids"]) > 1:
            return  # padding has no logits to compare
        with patched(case.model, QUARTER, periphery=True, head_reduce="max"):
            report = verify(case.model, case.inputs, steps=2)
        assert report.passed, report

    def test_context_tokens_are_exact_or_refused(self, case: CaseLike) -> None:
        tokens = initial_context_tokens(case.model, 3)
        config = root_model(case.model).config
        reason = adapter_for(config.model_type).context_reason(config)
        try:
            with patched(case.model, QUARTER, context_tokens=tokens):
                assert not reason, f"context tokens were taken although {reason}"
                if len(case.inputs["input_ids"]) == 1:
                    report = verify(case.model, case.inputs, steps=2)
                    assert report.passed, report
        except UnsupportedModelError as error:
            assert reason and reason in str(error), error

    def test_undo_is_exact(self, case: CaseLike) -> None:
        dense, _ = generate_logits(case.model, case.inputs, 2)
        before = fingerprint(case.model)
        with patched(case.model, QUARTER):
            generate_logits(case.model, case.inputs, 2)
            assert fingerprint(case.model) != before
        assert fingerprint(case.model) == before
        again, _ = generate_logits(case.model, case.inputs, 2)
        assert torch.equal(again, dense)


@dataclasses.dataclass
class _Step:
    """One routed layer of one decode step, with everything the reference needs."""

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor
    score_mod: ScoreMod
    output: Tensor
    key_heads: int

    def check(self, settings: GazeConfig, spans: Sequence[Span]) -> int:
        """Compare with the reference; returns the visual entries that it kept, summed over selections."""
        kept, group = 0, self.query.shape[1] // self.key_heads
        for row in range(len(self.query)):
            of_row = [span for span in spans if span.row == row]
            expected = self.expected(row, settings, of_row)
            error = (self.output[row, 0].float() - expected.output).abs().max().item()
            assert error <= 2e-5 * max(1.0, expected.output.abs().max().item()), f"row {row}: {error}"
            positions = [position for span in of_row for position in span.positions()]
            kept += int(expected.kept[:, positions].sum())
        return kept if settings.head_reduce == "none" else kept // group

    def expected(self, row: int, settings: GazeConfig, spans: Sequence[Span]) -> Attended:
        """What the reference makes of a row, whose spans these are."""
        rows = len(self.query)
        scale, softcap, sinks, bias, _ = self.score_mod
        return gaze_reference(
            self.query[row, :, 0],
            self.key[row],
            self.value[row],
            spans,
            settings,
            scale,
            self.visible[row],
            math.inf if softcap is None else softcap,
            None if sinks is None else sinks.expand(rows, -1, -1)[row, :, -1],
            None if bias is None else bias.expand(rows, -1, -1, -1)[row, :, -1],
            self.key_heads,
        )


@contextmanager
def _spied(model: nn.Module) -> Iterator[list[_Step]]:
    """Notes every routed decode step of a patched model."""
    steps: list[_Step] = []
    attention, runtime = patch_of(model).attention, patch_of(model).runtime
    decode = attention.decode

    def noted(forward: Any, layer: int, module: Any, query: Tensor, score_mod: ScoreMod, mask: Any) -> Tensor:
        output = decode(forward, layer, module, query, score_mod, mask)
        key, value = forward.cache.layers[runtime.store_of.get(layer, layer)].logical()
        key_heads = key.shape[1]
        if runtime.latent:
            key, value = module.expand_kv(key, value)
        shown = torch.ones(len(query), key.shape[2], dtype=torch.bool)
        if mask is not None:
            shown = visible(mask[:, 0, -1]).expand_as(shown)
        steps.append(_Step(layer, query, key, value, shown, score_mod, output, key_heads))
        return output

    attention.decode = noted  # type: ignore[method-assign]
    try:
        yield steps
    finally:
        del attention.decode


def _assert_close(actual: Tensor, expected: Tensor) -> None:
    error, scale = (actual - expected).abs().max().item(), max(1.0, expected.abs().max().item())
    assert error <= TOLERANCE * scale, f"differs by {error:.2e} at scale {scale:.1f}"
