"""What happens around one forward of a patched model: find the visual tokens, prepare the cache, decide who gazes.

One `Runtime` per patched model. What belongs to a running forward is kept per thread, so that two threads that
generate with the same model do not see each other.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from gazepatch.adapters.base import Adapter
from gazepatch.caches.adoption import Layers, adopt, stepping
from gazepatch.caches.crossing import new_keys, state_of_images
from gazepatch.caches.latents import Expand, LatentLayer
from gazepatch.caches.layer import GazeLayer
from gazepatch.caches.state import GazeState
from gazepatch.caches.static import StaticState
from gazepatch.config import GazeConfig
from gazepatch.errors import PatchError, UnsupportedModelError
from gazepatch.insertion import Insertion, OwnImage, insert
from gazepatch.layout import Span
from gazepatch.splice import lengthen, lengthen_step, shorten
from gazepatch.stats import Counters
from gazepatch.trace import Trace

logger = logging.getLogger("gazepatch")

#: The decoder's parameter that holds the embeddings of the context tokens.
CONTEXT_TOKENS = "gaze_context_tokens"

#: The argument by which layers that are run again for their gradients know the forward that they belong to.
OF_FORWARD = "gaze_forward"

MODALITIES = ("image", "video")


@dataclass
class Forward:
    """A running forward.

    Attributes:
        state: What its cache's layers share; of a temporary cache when the forward keeps none.
        cache: The cache, or None.
        past: Slots filled before it; -1 in a step on a static cache: only the device knows.
        tokens: Slots of its own.
        insertion: Where its context tokens are; None without any.
        routed: Columns of the new tokens whose queries gaze, `[Q]`; None when no query of a prompt does.
        routed_rows: `[B, Q]` which rows those are text in.
        trace: Who wants to know what this decode step reads; None: nobody.
        reads: For `trace`: by layer, what `DecodePlan.numbers` says; None where everything was read.
        across: The same forward as cross-attention layers see it, whose keys are images; None in other families.
    """

    state: GazeState
    cache: Cache | None
    past: int
    tokens: int
    insertion: Insertion | None = None
    routed: Tensor | None = None
    routed_rows: Tensor | None = None
    trace: Trace | None = None
    reads: dict[int, Tensor | None] = field(default_factory=dict)
    across: Forward | None = None
    _own_images: dict[torch.device, OwnImage] = field(default_factory=dict)
    _bias: tuple[Tensor | None, torch.device, Tensor | None] | None = None

    def bias(self, mask: Tensor | None, device: torch.device) -> Tensor | None:
        """`GazeState.bias`, worked out once for the layers that share a mask and a device."""
        if self._bias is None or self._bias[0] is not mask or self._bias[1] != device:
            self._bias = (mask, device, self.state.bias(mask, device))
        return self._bias[2]

    def own_image(self, device: torch.device) -> OwnImage | None:
        """`Insertion.own_image`, made once a device."""
        if self.insertion is not None and device not in self._own_images:
            self._own_images[device] = OwnImage(*(table.to(device) for table in self.insertion.own_image()))
        return self._own_images.get(device)

    def count(self, layer: int, heads: int, key_heads: int, visual: int, read: int | Tensor) -> None:
        """Count what a layer read in a decode step: context tokens always, once for every selection."""
        if isinstance(self.state, StaticState):
            return self.state.counters.add_read(layer, read)
        selections = heads if self.state.config.head_reduce == "none" else key_heads
        self.state.counters.add(layer, visual, read, selections * self.state.slots.context_tokens)

    def count_whole(self, layer: int, heads: int, key_heads: int) -> None:
        """Count a decode step of a sequence with few visual tokens, all of which the model's own attention reads."""
        selections = heads if self.state.config.head_reduce == "none" else key_heads
        entries = selections * sum(span.tokens for span in self.state.spans)
        self.count(layer, heads, key_heads, entries, entries)
        self.reads[layer] = None


class _Running(threading.local):
    """What one thread is doing with the model."""

    def __init__(self) -> None:
        self.ids: Tensor | None = None
        self.mask: Tensor | None = None
        self.captured: dict[str, dict[str, Any]] = {}
        self.capturing = False
        self.dense = False
        self.forward: Forward | None = None
        self.latents: tuple[Tensor, Tensor] | None = None
        self.trace: Trace | None = None


class Runtime:
    """The running side of one patched model.

    Args:
        adapter: Facts about the architecture.
        model_config: Configuration of the whole model.
        decoder: The text decoder. It is not kept.
        config: Settings.
        gaze_layers: Indices of the layers that gaze.
    """

    def __init__(
        self, adapter: Adapter, model_config: Any, decoder: nn.Module, config: GazeConfig, gaze_layers: Sequence[int]
    ) -> None:
        self.adapter, self.model_config, self.config = adapter, model_config, config
        self.text_config = adapter.text_config(model_config)
        self.gaze_layers = tuple(gaze_layers)
        self.flash = str(decoder.config._attn_implementation).startswith("flash")  # type: ignore[union-attr]
        self.store_of = adapter.store_layers(model_config)
        #: Whether caches hold latents, a single key head for all query heads.
        self.latent = adapter.latent(model_config)
        self.cross_layers = adapter.cross_layers(model_config)
        #: Layers whose entries are kept region by region, among those of the sequence.
        self.stores = tuple(sorted({self.store_of.get(layer, layer) for layer in gaze_layers} - {*self.cross_layers}))
        self.layers = Layers(
            self.text_config.num_hidden_layers,
            self.stores,
            self.cross_layers,
            LatentLayer if self.latent else GazeLayer,
        )
        self.decoder_signature = inspect.signature(decoder.forward)
        self.counters = Counters()
        self.running = _Running()
        self._warned = False

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise PatchError(
            "a patched model cannot be copied or pickled, because its undoing belongs to this one: "
            "call gazepatch.restore(model) first, then apply to both"
        )

    # ---- hooks on the multimodal model: they see the token ids

    def before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember the token ids and the padding mask of the forward that starts."""
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments if args else kwargs
        ids, mask = bound.get("input_ids"), bound.get("attention_mask")
        self.running.ids = ids if torch.is_tensor(ids) else None
        self.running.mask = mask if torch.is_tensor(mask) and mask.dim() == 2 else None

    def after_model(self, *_: Any) -> None:
        """Forget them."""
        self.running.ids = self.running.mask = None

    def capture(self, modality: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `get_image_features` or `get_video_features`, which every path goes through, to see its arguments."""
        signature = inspect.signature(function)

        @functools.wraps(function)  # generate() reads the signature
        def captured(*args: Any, **kwargs: Any) -> Any:
            running = self.running
            # Video features are often made by way of image features; a dense forward needs none of this.
            if running.capturing or running.dense:
                return function(*args, **kwargs)
            running.captured[modality] = _arguments(signature, args, kwargs)
            running.capturing = True
            try:
                return function(*args, **kwargs)
            finally:
                running.capturing = False

        return captured

    def expanding(self, expand: Expand) -> Expand:
        """Wrap `expand_kv` of an attention module, to see the latents of a forward without a cache too."""

        @functools.wraps(expand)
        def expanded(latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
            self.running.latents = latent, rotated
            return expand(latent, rotated)

        return expanded

    # ---- hooks on the text decoder

    def before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Prepare the cache and decide which queries gaze."""
        if self.running.dense:
            return None
        if args:
            kwargs = {**kwargs, **self.decoder_signature.bind_partial(*args).arguments}
        hidden = kwargs.get("inputs_embeds")
        hidden = kwargs.get("input_ids") if hidden is None else hidden
        if not torch.is_tensor(hidden):
            return None  # the decoder itself says what it needs
        rows, tokens = hidden.shape[:2]
        kwargs = dict(kwargs)
        cache = kwargs.get("past_key_values")
        if tokens == 1 and cache is not None and (ready := stepping(cache, self)) is not None:
            self._step(ready, cache, rows)
            return (), lengthen_step(kwargs, ready, hidden) if ready.slots.inserted else kwargs
        if _checkpoints(module) and cache is not None and cache.get_seq_length() == 0:
            cache = kwargs["past_key_values"] = None  # the layers would not fill it either
        if cache is None and self._will_cache(module, kwargs):
            cache = kwargs["past_key_values"] = DynamicCache(config=self.text_config)
        state = GazeState(self, self.config) if cache is None else adopt(cache, self, self.config, self.layers)
        forward = self.running.forward = self._start(state, cache, rows, tokens)
        if self.adapter.across:
            forward.across = self._across(forward, kwargs, rows)
        if state.slots.inserted:
            embeddings = getattr(module, CONTEXT_TOKENS)
            kwargs = lengthen(kwargs, state, forward.insertion, embeddings, cache)
        kept = kwargs.get("logits_to_keep")
        if self.store_of and isinstance(kept, int) and (kept > 1 or self.flash or forward.insertion is not None):
            # Layers that share keys drop all queries but these last ones. Without a mask of four dimensions only a
            # single one can go without the others, and it must be a token.
            kwargs["logits_to_keep"] = 0
        routes = any(each is not None and each.routed is not None for each in (forward, forward.across))
        if self._runs_again(module) and (forward.insertion is not None or routes):
            kwargs[OF_FORWARD] = forward
        return (), kwargs

    def after_decoder(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """The forward is over, or failed (`output` is None)."""
        forward, self.running.forward, self.running.latents = self.running.forward, None, None
        if forward is None:
            return None
        for each in (forward, forward.across):
            if each is not None:
                each.state.finish(completed=output is not None)
                if each.trace is not None and output is not None:
                    each.trace.add(each.reads)
        return output if output is None or forward.insertion is None else shorten(output, forward.insertion)

    def _runs_again(self, decoder: nn.Module) -> bool:
        """Whether gradient checkpointing will run layers again, outside of this forward."""
        if not (_checkpoints(decoder) and torch.is_grad_enabled()):
            return False
        if all(p.kind is not p.VAR_KEYWORD for p in self.decoder_signature.parameters.values()):
            raise UnsupportedModelError(
                "this text decoder passes nothing on to its layers, so gradient checkpointing cannot tell them where "
                "they gaze: call model.gradient_checkpointing_disable()"
            )
        return True

    def _will_cache(self, decoder: nn.Module, kwargs: Mapping[str, Any]) -> bool:
        """Whether the decoder is about to make a cache of its own, which has to be ours."""
        if _checkpoints(decoder):
            return False
        wanted = kwargs.get("use_cache")
        return bool(getattr(self.text_config, "use_cache", False) if wanted is None else wanted)

    def _step(self, state: StaticState, cache: Cache, rows: int) -> None:
        """A decode step on a static cache starts. No Python value here may differ from one step to the next."""
        state.step()
        forward = self.running.forward = Forward(state, cache, -1, 1)
        if self.running.trace is not None:
            self.running.trace.follow(state, rows, False)
            forward.trace = self.running.trace if state.spans else None

    def _start(self, state: GazeState, cache: Cache | None, rows: int, tokens: int) -> Forward:
        past = state.length
        prompt = tokens > 1 or past == 0
        ids = self._ids(rows, tokens) if prompt and not self.adapter.across else None
        spans = self._spans(ids)
        text = self._text(ids, spans) if ids is not None and self.config.prefill == "gaze" else None
        insertion = insert(spans, rows, tokens, self.config.context_tokens)
        if insertion is not None:
            spans, tokens = insertion.moved(spans), insertion.source.shape[1]
        spans = [replace(span, start=span.start + past, stop=span.stop + past) for span in spans]
        state.begin(spans, rows, tokens, insertion)
        forward = Forward(state, cache, past, tokens, insertion)
        if not self.adapter.across:
            self._record(forward, rows, prompt)
        if text is not None and state.regions is not None:
            forward.routed, forward.routed_rows = _routed(text, insertion, past, state)
        return forward

    def _across(self, text: Forward, arguments: Mapping[str, Any], rows: int) -> Forward:
        """The forward as cross-attention layers see it: all keys come before it, and a mask says who sees them."""
        prompt = text.tokens > 1 or text.past == 0
        state = state_of_images(text.cache, self, self.config, self.cross_layers, self.gaze_layers)
        keys, spans = new_keys(self.adapter, self.model_config, arguments, rows)
        others = state.look(spans, rows, keys, arguments.get(self.adapter.cross_mask), decoding=not prompt)
        forward = Forward(state, text.cache, state.length + keys, text.tokens)
        self._record(forward, rows, prompt, others)
        if prompt and self.config.prefill == "gaze" and state.regions is not None:
            forward.routed = torch.arange(text.tokens)
            forward.routed_rows = torch.ones(rows, text.tokens, dtype=torch.bool)
        return forward

    def _record(self, forward: Forward, rows: int, prompt: bool, others: bool = False) -> None:
        """Start the counters and the trace anew with a prompt; go on with a decode step.

        A trace, which numbers the regions that a query sees, starts anew as well where it sees `others`.
        """
        state = forward.state
        if self.running.trace is not None:
            self.running.trace.follow(state, rows, prompt or others)
        if prompt:
            self.counters = state.counters
            state.counters.clear()
        elif state.spans:
            state.counters.steps += 1
            forward.trace = self.running.trace

    def _ids(self, rows: int, tokens: int) -> list[list[int]] | None:
        """Token ids of the new tokens, -1 for padding."""
        ids, mask = self.running.ids, self.running.mask
        if ids is None or tuple(ids.shape) != (rows, tokens):
            if ids is None and tokens > 1 and not self._warned:
                self._warned = True
                logger.warning("called without input_ids: visual tokens cannot be found, so this prompt is read whole")
            return None
        if mask is not None and mask.shape[1] >= tokens:
            ids = torch.where(mask[:, -tokens:].to(ids.device) == 0, -1, ids)
        listed: list[list[int]] = ids.tolist()
        return listed

    def _spans(self, ids: list[list[int]] | None) -> list[Span]:
        """Spans of a forward, by its own positions."""
        captured, self.running.captured = self.running.captured, {}
        return [] if ids is None else self.adapter.locate(self.model_config, ids, captured)

    def _text(self, ids: list[list[int]], spans: Sequence[Span]) -> Tensor:
        """`[B, S]` which tokens are text: not those inside an image (break tokens, newlines)."""
        media = {i for modality in MODALITIES for i in self.adapter.token_ids(self.model_config, modality)}
        text = torch.tensor([[i not in media and i >= 0 for i in row] for row in ids])
        for span in spans:
            text[span.row, span.start : span.stop] = False
        return text


def _checkpoints(decoder: nn.Module) -> bool:
    """Whether the layers keep nothing for their gradients, and use no cache."""
    return bool(getattr(decoder, "gradient_checkpointing", False)) and decoder.training


def _routed(
    text: Tensor, insertion: Insertion | None, past: int, state: GazeState
) -> tuple[Tensor | None, Tensor | None]:
    """Columns and rows of text queries behind a whole span."""
    if insertion is not None:
        text = torch.zeros_like(insertion.source, dtype=torch.bool).scatter(1, insertion.slots, text)
    assert state.regions is not None
    stop = state.regions.stop.masked_fill(state.regions.length == 0, torch.iinfo(torch.long).max)
    text = text & (torch.arange(past, past + text.shape[1]) >= stop.amin(-1, keepdim=True))
    columns = text.any(0).nonzero()[:, 0]
    return (columns, text[:, columns]) if len(columns) else (None, None)


def _arguments(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, those of `**kwargs` among them."""
    bound = signature.bind_partial(*args, **kwargs).arguments
    names = [name for name, p in signature.parameters.items() if p.kind is inspect.Parameter.VAR_KEYWORD]
    extra: dict[str, Any] = {}
    for name in names:
        extra |= bound.pop(name, {})
    return {**bound, **extra}
