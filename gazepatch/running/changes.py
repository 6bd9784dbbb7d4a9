"""Every change of a model, each noted with its undoing as it is made, so that a failure half-way leaves nothing."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from gazepatch.running.attention import GazeAttention, unregister
from gazepatch.running.capture import MODALITIES, OFFSET, Capture
from gazepatch.running.decoder import CONTEXT_TOKENS, DecoderHooks
from gazepatch.running.repeating import Repeating

#: What takes the changes back, in the order they were made.
Undo = list[Callable[[], None]]


def add_parameter(root: PreTrainedModel, decoder: nn.Module, made: nn.Parameter, undo: Undo) -> None:
    """Give the text decoder its context tokens."""

    def back() -> None:
        decoder._parameters.pop(CONTEXT_TOKENS, None)  # not there if it never got there, or somebody has removed it

    undo.append(back)
    decoder.register_parameter(CONTEXT_TOKENS, made)
    # The model's own files stay as they were: context tokens have one of their own.
    ignored = list(root._keys_to_ignore_on_save or [])
    names = [name for name, held in root.named_parameters() if held is made]
    set_attribute(root, "_keys_to_ignore_on_save", ignored + names, undo)


def put_hooks(root: PreTrainedModel, decoder: nn.Module, attention: GazeAttention, undo: Undo) -> None:
    """Let a model run through the attention of its patch, and through the hooks that tell this what goes on."""
    runtime = attention.runtime
    # A model that is thrown away while patched must leave behind neither its functions nor, where another model shares
    # its configuration, their name.
    known: Undo = [functools.partial(unregister, attention.name)]
    finalizer = weakref.finalize(root, take_back, known)
    undo.append(lambda: finalizer() and None)
    attention.register()
    set_attribute(decoder.config, "_attn_implementation_internal", attention.name, known)
    base, capture, hooks = root.base_model, Capture(runtime), DecoderHooks(runtime, decoder, attention.name)
    for modality in MODALITIES:
        if (function := getattr(base, name := f"get_{modality}_features", None)) is not None:
            set_attribute(base, name, capture.features(modality, function), undo)
    if (function := getattr(root, "_prefill", None)) is not None:  # which a model without a head does not have
        set_attribute(root, "_prefill", capture.prefill(function), undo)
    if runtime.latent:
        for module in decoder.modules():
            if (expand := getattr(module, "expand_kv", None)) is not None:
                set_attribute(module, "expand_kv", capture.latents(expand), undo)
    if runtime.layers.copies:
        for module in decoder.modules():
            if OFFSET in inspect.signature(module.forward).parameters:
                undo.append(module.register_forward_pre_hook(capture.before_run, with_kwargs=True).remove)
    if runtime.adapter.cross_attention:
        _follow_mask(root, Repeating(runtime), undo)
    # One at a time, each with its undoing, so that a failure half-way leaves nothing.
    undo.append(base.register_forward_pre_hook(capture.before_model, with_kwargs=True).remove)
    undo.append(base.register_forward_hook(capture.after_model, always_call=True).remove)
    undo.append(decoder.register_forward_pre_hook(hooks.before, with_kwargs=True).remove)
    undo.append(decoder.register_forward_hook(hooks.after, with_kwargs=True, always_call=True).remove)


def _follow_mask(root: PreTrainedModel, repeating: Repeating, undo: Undo) -> None:
    generates = {
        "prepare_inputs_for_generation": repeating.prepare,
        "_update_model_kwargs_for_generation": repeating.update,
    }
    for name, wrap in generates.items():
        if (function := getattr(root, name, None)) is not None:  # which a model without a head does not have
            set_attribute(root, name, wrap(function), undo)
    undo.append(root.base_model.register_forward_pre_hook(repeating.before_model, with_kwargs=True).remove)


def set_attribute(owner: Any, name: str, value: Any, undo: Undo) -> None:
    """Set an attribute of the instance, so that neither class nor other instances notice."""
    before = vars(owner).get(name, undo)  # a value that no attribute has stands for "not there"

    def back() -> None:
        if vars(owner).get(name) is not value:
            return  # somebody changed it since: that is theirs to keep
        if before is undo:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    undo.append(back)
    setattr(owner, name, value)


def take_back(undo: Undo) -> None:
    """Undo all changes, the last one first."""
    while undo:
        undo.pop()()
