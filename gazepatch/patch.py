"""`apply` and `restore`, and what there is to ask of a patched model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gazepatch.adapters.base import Adapter
from gazepatch.backend import choose
from gazepatch.config import GazeConfig, settings_of
from gazepatch.context import parameter, with_context_tokens
from gazepatch.counters import PromptReads, Stats
from gazepatch.eager import nothing_compiled
from gazepatch.errors import PatchError, UnsupportedModelError
from gazepatch.layers import gaze_layers
from gazepatch.registry import adapter_for
from gazepatch.running.attention import PREFIX, GazeAttention
from gazepatch.running.changes import Undo, add_parameter, put_hooks, set_attribute, take_back
from gazepatch.running.decoder import CONTEXT_TOKENS
from gazepatch.running.runtime import Runtime
from gazepatch.tracing import Trace

Model = TypeVar("Model", bound=nn.Module)

#: The attribute of a patched model that holds its `Patch`.
ATTRIBUTE = "_gazepatch"

#: Original implementations that the patched decoder can fall back on.
ORIGINALS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4")


@dataclass
class Patch:
    """A patched model's settings and state, and how to undo every change, in the order they were made."""

    config: GazeConfig
    runtime: Runtime
    attention: GazeAttention
    undo: Undo


def apply(
    model: Model,
    config: GazeConfig | None = None,
    *,
    context_tokens: Tensor | str | Path | None = None,
    **settings: Any,
) -> Model:
    """Make `model` gaze, in place.

    Args:
        model: A vision-language model of transformers, or a PEFT model around one.
        config: Settings; the defaults are for checkpoints that were not trained with gaze.
        context_tokens: Embeddings `[M, hidden]`, or the `context_tokens.safetensors` that holds them, or its folder.
            They become one parameter of the text decoder, which `restore` removes; a `torch.nn.Parameter` is taken as
            it is, anything else copied. `config.context_tokens` may be M, or 0, and is then taken from here.
        **settings: Fields of `GazeConfig` to change in `config`.

    Returns:
        The same model.

    Raises:
        PatchError: The model is patched already, or a part of it.
        UnsupportedModelError: The architecture has no adapter, or none of its layers can gaze, or it takes no context
            tokens.
        ConfigError: A setting is wrong, or does not fit the model or the context tokens.
        ArtefactError: The file of the context tokens is damaged, or made for another model.
    """
    root = root_model(model)
    config = settings_of(config, GazeConfig()).changed(settings)
    if hasattr(root, ATTRIBUTE):
        raise PatchError(
            f"this model is patched already, with {patch_of(model).config}: to change settings, call "
            "gazepatch.restore(model) first"
        )
    adapter = adapter_for(root.config.model_type)
    decoder = adapter.decoder(root)
    layers = gaze_layers(adapter, root.config, config)
    original = _attention(decoder)
    hidden_size = adapter.text_config(root.config).hidden_size
    config, tokens = with_context_tokens(config, context_tokens, root.config.model_type, hidden_size)
    if tokens is not None:
        _check_context_tokens(adapter, root.config, original)
    if config.backend == "triton" and not torch.cuda.is_available():
        choose(config.backend, root.device)  # the model cannot be moved to a GPU later either
    runtime = Runtime(adapter, root.config, decoder, config, layers)
    patch = Patch(config, runtime, GazeAttention(runtime, original), [])
    try:
        if tokens is not None:
            add_parameter(root, decoder, parameter(tokens, decoder), patch.undo)
        put_hooks(root, decoder, patch.attention, patch.undo)
        set_attribute(root, ATTRIBUTE, patch, patch.undo)
    except BaseException:
        take_back(patch.undo)
        raise
    return model


def restore(model: Model) -> Model:
    """Undo `apply` exactly; returns the same model.

    Raises:
        PatchError: The model is not patched.
    """
    patch = patch_of(model)
    take_back(patch.undo)
    return model


@contextmanager
def patched(
    model: Model,
    config: GazeConfig | None = None,
    *,
    context_tokens: Tensor | str | Path | None = None,
    **settings: Any,
) -> Iterator[Model]:
    """`apply` for the length of a `with` block, and `restore` after it if nobody did, also after an exception."""
    apply(model, config, context_tokens=context_tokens, **settings)
    try:
        yield model
    finally:
        if is_patched(model):
            restore(model)


@contextmanager
def restored(model: Model) -> Iterator[Model]:
    """The unpatched model for the length of a `with` block; after it, it is patched anew, with the same tokens.

    Caches that the first patch has filled cannot be used with the new one.

    Raises:
        PatchError: The model is not patched.
    """
    config, tokens = patch_of(model).config, context_tokens_of(model)
    restore(model)
    try:
        yield model
    finally:
        apply(model, config, context_tokens=tokens)


@contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """Let a patched model read densely for the length of a `with` block: its logits are those of the unpatched model.

    Nothing is taken off the model, so that optimisers and wrappers around it notice nothing. It holds for the calling
    thread. A cache belongs to one side of the block: one that was filled on the other is refused.

    Raises:
        PatchError: The model is not patched.
    """
    blocks, block = patch_of(model).runtime.running.dense, object()
    blocks.add(block)
    try:
        yield
    finally:
        blocks.discard(block)  # by itself: generators may be left in another order than they were entered


@contextmanager
def trace(model: nn.Module) -> Iterator[Trace]:
    """Record which regions a patched model reads, for the length of a `with` block.

    Holds for the calling thread. The trace is of the last prompt and the decode steps after it; what queries of the
    prompt itself read (`prefill="gaze"`) is not in it. It stays readable when the block is over. Within the block,
    nothing that `torch.compile` made is used, in the whole process: a compiler would see another list in every step.

    Raises:
        PatchError: The model is not patched, or a trace of it is on already.
    """
    running = patch_of(model).runtime.running
    if running.trace is not None:
        raise PatchError("expected one trace of this model at a time, and one is on already: leave its block first")
    running.trace = made = Trace()
    try:
        with nothing_compiled():
            yield made
    finally:
        running.trace = None


@contextmanager
def prompt_reads(model: nn.Module, tokens: Tensor) -> Iterator[PromptReads]:
    """Count what queries of a prompt read that gaze (`prefill="gaze"`), for the length of a `with` block.

    Holds for the calling thread. Of images in the sequence nothing is counted where every row has fewer visual tokens
    than `min_visual_tokens`. Otherwise, and of images in cross-attention layers always, a query that sees too few of
    them counts as one that reads them all.

    Args:
        model: The patched model. Within the block it takes prompts of the shape `[B, S]` alone.
        tokens: `[B, S]` boolean: the tokens whose queries count, where they are text after an image.

    Raises:
        PatchError: The model is not patched.
    """
    running = patch_of(model).runtime.running
    before, running.reads = running.reads, PromptReads(tokens)
    try:
        yield running.reads
    finally:
        running.reads = before


def set_budget(model: nn.Module, budget: float | int) -> None:
    """Change the budget of a patched model, in place; caches that are filled already keep the one they had.

    Raises:
        PatchError: The model is not patched.
        ConfigError: `budget` is not one.
    """
    patch = patch_of(model)
    patch.config = patch.runtime.config = replace(patch.config, budget=budget)


def is_patched(model: nn.Module) -> bool:
    """Whether `apply` is in force on this model."""
    return hasattr(root_model(model), ATTRIBUTE)


def stats(model: nn.Module) -> Stats:
    """What the decode steps since the last prompt of the calling thread read.

    For a thread that never ran the model, such as one that only reads a streamer: since the last prompt of any thread.

    Raises:
        PatchError: The model is not patched.
    """
    runtime = patch_of(model).runtime
    return (runtime.running.counters or runtime.counters).stats()


def context_tokens_of(model: nn.Module) -> Tensor | None:
    """The parameter `[M, hidden]` that holds the context tokens of a patched model; None when it has none.

    PEFT freezes every parameter it finds: to train these too, wrap the model before `apply`, or unfreeze them again.
    In a model that FSDP2 spreads over processes it is a shard (a `DTensor`) while no forward runs.

    Raises:
        PatchError: The model is not patched.
    """
    decoder = patch_of(model).runtime.adapter.decoder(root_model(model))
    return getattr(decoder, CONTEXT_TOKENS, None)


def patch_of(model: nn.Module) -> Patch:
    """The patch in force on a model.

    Raises:
        PatchError: There is none.
    """
    patch = getattr(root_model(model), ATTRIBUTE, None)
    if not isinstance(patch, Patch):
        raise PatchError("this model is not patched: call gazepatch.apply(model) first")
    return patch


def root_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside what was given."""
    inner: Any = model
    wrappers = ("_orig_mod", "module")  # of torch.compile, and of DDP
    while not isinstance(inner, PreTrainedModel) and (name := next((w for w in wrappers if hasattr(inner, w)), None)):
        inner = getattr(inner, name)
    if hasattr(inner, "get_base_model"):  # PEFT
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise UnsupportedModelError(
            f"expected a model of transformers, got {type(model).__module__}.{type(model).__name__}"
        )
    return inner


def generating_model(model: nn.Module) -> Any:
    """The transformers model inside what was given, which can write.

    Raises:
        UnsupportedModelError: It has no `generate`.
    """
    root = root_model(model)
    if not hasattr(root, "generate"):
        raise UnsupportedModelError(
            f"expected a model that generates tokens, got a {type(root).__name__}, which has no language head: load it "
            "with AutoModelForImageTextToText"
        )
    return root


def _attention(decoder: nn.Module) -> str:
    """The name of the attention of a text decoder, which a patch can stand in for."""
    name: str = decoder.config._attn_implementation  # type: ignore[union-attr, assignment]
    if name.startswith(PREFIX):
        raise PatchError(
            "a part of this model, or a model around it, is patched already: call gazepatch.restore on that one first. "
            "If it was made with a copy of a patched model's configuration, call "
            "model.set_attn_implementation('sdpa') instead"
        )
    if name not in ORIGINALS:
        raise UnsupportedModelError(
            f"expected a text decoder with attn_implementation in {', '.join(ORIGINALS)}, got {name!r}: "
            "load the model with attn_implementation='sdpa'"
        )
    return name


def _check_context_tokens(adapter: Adapter, model_config: Any, attention: str) -> None:
    """Raise UnsupportedModelError where a model takes none."""
    if reason := adapter.context_reason(model_config):
        raise UnsupportedModelError(
            f"this {model_config.model_type} takes no context tokens, because {reason}: patch it with context_tokens=0"
        )
    if attention.startswith("flash") and _has_local_layers(adapter, model_config):
        raise UnsupportedModelError(
            "context tokens in a model with local attention layers need a mask, which flash attention does not take: "
            "load the model with attn_implementation='sdpa'"
        )


def _has_local_layers(adapter: Adapter, model_config: Any) -> bool:
    return any("layer" in reason for reason in adapter.dense_reasons(model_config).values())
