"""The door of the text decoder: its call gets a cache of ours, and context tokens, and its output loses them again."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from gazepatch.caches.adoption import adopt, stepping
from gazepatch.caches.name import CACHE, FORMER
from gazepatch.caches.state import GazeState
from gazepatch.errors import PatchError, UnsupportedModelError
from gazepatch.insertion import Insertion
from gazepatch.running.checkpointing import checkpoints, hand_on, runs_again
from gazepatch.running.cross_attention import start_cross_attention, step_cross_attention
from gazepatch.running.forward import Forward
from gazepatch.running.masks import Documents, documents
from gazepatch.running.runtime import Runtime
from gazepatch.running.splice import lengthen, lengthen_step, shorten
from gazepatch.running.starting import start, start_step
from gazepatch.uncompiled import uncompiled

#: The decoder's parameter that holds the embeddings of the context tokens.
CONTEXT_TOKENS = "gaze_context_tokens"


class DecoderHooks:
    """Hooks on the text decoder of one patched model, which is given to read its signature and not kept.

    `attention` is the name under which transformers knows the patch's.
    """

    def __init__(self, runtime: Runtime, decoder: nn.Module, attention: str) -> None:
        self.runtime, self.attention = runtime, attention
        self.signature = inspect.signature(decoder.forward)
        # A decoder that is not transformers' own may have kept the former name.
        self.cache_name = FORMER if FORMER in self.signature.parameters else CACHE

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward starts; returns the arguments to call the decoder with, or None to leave them."""
        runtime = self.runtime
        if runtime.running.dense:
            runtime.running.forward = None  # one that was interrupted never ended
            return None
        if (found := module.config._attn_implementation) != self.attention:  # type: ignore[union-attr]
            raise PatchError(
                f"the attention of this patched model was changed to {found!r}: call gazepatch.restore(model), change "
                "it, and apply again"
            )
        call = {**kwargs, **self.signature.bind_partial(*args).arguments} if args else dict(kwargs)
        if FORMER in call and self.cache_name != FORMER:  # the decoder takes it, but tells its user to change
            call.setdefault(self.cache_name, call.pop(FORMER))
        hidden = call.get("inputs_embeds")
        hidden = call.get("input_ids") if hidden is None else hidden
        if not torch.is_tensor(hidden):
            return None  # the decoder itself says what it needs
        rows, tokens = hidden.shape[:2]
        cache = call.get(self.cache_name)
        brings = call.get(runtime.adapter.cross_states) is not None  # images, which no step does
        steps = tokens == 1 and not brings and runtime.running.prefill is None
        if steps and cache is not None and (ready := stepping(cache, runtime)) is not None:
            forward = start_step(runtime, ready, cache, rows)
            if runtime.adapter.cross_attention:
                forward.cross_attention = step_cross_attention(runtime, forward, call, rows)
            return (), lengthen_step(call, ready, hidden) if ready.slots.inserted else call
        return (), self._started(module, call, hidden)

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """The forward is over, or failed (`output` is None)."""
        running = self.runtime.running
        forward, running.forward, running.latents = running.forward, None, None
        if forward is None:
            return None
        forward.finish(completed=output is not None)
        return output if output is None or forward.insertion is None else shorten(output, forward.insertion)

    @uncompiled  # where a compiler gives up half-way, it drops which forward is running (torch 2.13)
    def _started(self, decoder: nn.Module, call: dict[str, Any], hidden: Tensor) -> dict[str, Any]:
        """Start any forward but a step on a static cache; returns the arguments of the decoder."""
        runtime, (rows, tokens) = self.runtime, hidden.shape[:2]
        cache = self._cache(decoder, call)
        if cache is None:
            state = GazeState(runtime, runtime.config)
        else:
            state = adopt(cache, runtime, runtime.config, runtime.layers)
        forward = runtime.running.forward = start(runtime, state, cache, rows, tokens)
        if runtime.adapter.cross_attention:
            forward.cross_attention = start_cross_attention(runtime, forward, call, rows)
        if forward.insertion is not None or forward.routes:
            forward.documents = self._documents(call, cache, forward.insertion)
        if state.slots.inserted:
            call = lengthen(call, state, forward.insertion, self._context_tokens(decoder), cache)
        if runtime.store_of:
            self._keep_queries(call, forward)
        if runs_again(decoder) and (forward.insertion is not None or forward.routes):
            hand_on(forward, call, self.signature)
        return call

    def _context_tokens(self, decoder: nn.Module) -> Tensor:
        tokens: Tensor = getattr(decoder, CONTEXT_TOKENS)
        if tokens.is_meta:
            raise PatchError(
                "the context tokens of this model are offloaded, so nobody can read them: load it with its device_map, "
                "or offload it, before gazepatch.apply"
            )
        return tokens

    def _cache(self, decoder: nn.Module, call: dict[str, Any]) -> Cache | None:
        """The cache to use: that of the call, or one that the decoder was about to make, which has to be ours."""
        cache: Cache | None = call.get(self.cache_name)
        if checkpoints(decoder):
            if cache is not None and cache.get_seq_length() == 0:
                cache = call[self.cache_name] = None  # the layers would not fill it either
        elif cache is None:
            wanted = call.get("use_cache")
            if getattr(self.runtime.text_config, "use_cache", False) if wanted is None else wanted:
                cache = call[self.cache_name] = DynamicCache(config=self.runtime.text_config)
        return cache

    def _documents(self, call: dict[str, Any], cache: Cache | None, insertion: Insertion | None) -> Documents | None:
        found = documents(call, cache, self.runtime.flash)
        if found is not None and self.runtime.flash:
            raise UnsupportedModelError(
                "packed sequences need a mask where prompts gaze or have context tokens, and flash attention takes "
                "none: load the model with attn_implementation='sdpa', or give each sequence a row of its own"
            )
        return None if found is None or insertion is None else found.by_slot(insertion)

    def _keep_queries(self, call: dict[str, Any], forward: Forward) -> None:
        # Layers that share keys drop all queries but those that logits are asked for, the last ones. Without a mask of
        # four dimensions only a single one can go without the others, and it must be a token.
        kept = call.get("logits_to_keep")
        if isinstance(kept, int) and (kept > 1 or self.runtime.flash or forward.insertion is not None):
            call["logits_to_keep"] = 0
