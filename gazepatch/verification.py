"""`verify`: proof on the user's own model and inputs that patching does no harm and can be undone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from gazepatch.answering import ONE_ANSWER
from gazepatch.config import GazeConfig, budget_text
from gazepatch.errors import ConfigError
from gazepatch.patch import (
    context_tokens_of,
    generating_model,
    is_patched,
    patch_of,
    patched,
    restored,
    root_model,
    stats,
)
from gazepatch.registry import adapter_for
from gazepatch.running.attention import GazeAttention

#: Largest difference of logits that is put down to the order of additions, relative to the largest logit.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}

#: Precisions in which two regions are often as good as equal: which of them a step reads is then a matter of rounding,
#: and changes what it gives.
HALF = (torch.float16, torch.bfloat16)

#: How many times more a model with gaze may differ between cached and uncached than it does unpatched. Few decoders
#: magnify rounding that much, and where one does, a choice among nearly equal regions does so again.
SLACK = 10


@dataclass(frozen=True)
class Check:
    """One promise and what was measured: `value` must not exceed `limit`."""

    name: str
    value: float
    limit: float
    note: str

    @property
    def passed(self) -> bool:
        """Whether the promise was kept; a NaN never is."""
        return self.value <= self.limit


@dataclass(frozen=True)
class Verification:
    """All checks of one model on one input."""

    checks: list[Check]

    @property
    def passed(self) -> bool:
        """Whether all promises were kept."""
        return all(check.passed for check in self.checks)


def verify(model: nn.Module, inputs: Mapping[str, Any], *, steps: int = 4) -> Verification:
    """Check a model on one input; it is left as it was, patched or not.

    Caches that it has filled while patched cannot be used any more, and `stats` start anew.

    Three promises. Reading every region gives the dense logits, over a prompt and `steps` greedy tokens; that is
    checked without context tokens, which are there to change them. What gazes reads the same whether its keys come from
    a cache or from one forward without any; in half precision one step in five may differ more than by rounding, as
    choices among equals go either way there. `restore` leaves the logits bit for bit, and the model's hooks, attributes
    and registries as they were.

    Args:
        model: A model, patched or not: its settings are checked, else the defaults.
        inputs: What a processor returns for the model, for one prompt with at least one image.
        steps: Decode steps.

    Raises:
        UnsupportedModelError: The model has no adapter, or no `generate`.
        ConfigError: There is nothing to check (no image, or no step), or the unpatched model is not the same with a
            cache and without.
    """
    if steps < 1:
        raise ConfigError(f"steps must be at least 1, got {steps}")
    if not is_patched(model):
        return _verify(model, inputs, steps, GazeConfig(), None)
    settings, tokens = patch_of(model).config, context_tokens_of(model)
    with restored(model):
        return _verify(model, inputs, steps, settings, tokens)


@torch.no_grad()
def _verify(
    model: nn.Module, inputs: Mapping[str, Any], steps: int, settings: GazeConfig, context_tokens: Tensor | None
) -> Verification:
    always = dataclasses.replace(settings, min_visual_tokens=0)
    dense, tokens = generate_logits(model, inputs, steps)
    own = _gap(dense, _uncached(model, inputs, tokens))
    before = fingerprint(model)  # after the first run, at which transformers sets up hooks of its own
    every = dataclasses.replace(always, budget=1.0, context_tokens=0)
    with patched(model, every):
        whole, _ = generate_logits(model, inputs, steps, tokens)
        if not stats(model).visual_entries:
            raise ConfigError(
                "expected inputs with at least one image, got none: without any, nothing gazes to be checked"
            )
    dtype = root_model(model).dtype
    limit = TOLERANCE.get(dtype, 1e-5) * max(1.0, dense.abs().max().item())
    if own > SLACK * limit:
        likely = "some do where a prompt ends in an image: end it with text"
        if root_model(model).training:
            likely = "one that is in training mode may: call model.eval()"
        raise ConfigError(
            f"these inputs cannot be checked: unpatched, the model differs by {own:.2g} between a cache and none, as "
            + likely
        )
    with patched(model, dataclasses.replace(always, prefill="gaze"), context_tokens=context_tokens):
        cached, _ = generate_logits(model, inputs, steps, tokens)
        uncached = _uncached(model, inputs, tokens)
    after = fingerprint(model)
    again, _ = generate_logits(model, inputs, steps, tokens)
    return Verification(
        [
            Check(
                "dense equivalence",
                _gap(dense, whole),
                limit,
                f"largest logit difference at budget {budget_text(every.budget)}, {steps} steps",
            ),
            Check(
                "cached equals uncached",
                _gap_of_most(cached, uncached) if dtype in HALF else _gap(cached, uncached),
                min(max(limit, SLACK * own), SLACK * limit),
                f"largest logit difference{' of four steps in five' if dtype in HALF else ''}, same steps",
            ),
            Check("exact undo: logits", _gap(dense, again), 0.0, "largest logit difference, before and after"),
            Check("exact undo: model", _changes(before, after), 0.0, "hooks, attributes and registries changed"),
        ]
    )


def generate_logits(
    model: nn.Module, inputs: Mapping[str, Any], steps: int, tokens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits `[B, steps + 1, V]` after the prompt and each new token: the given `[B, steps + 1]`, or the greedy."""
    # By way of generate, which alone knows how each family numbers the positions of new tokens.
    prompt = inputs["input_ids"].shape[1]
    root = generating_model(model)
    # Not a logits processor: Janus drops those.
    forced = None if tokens is None else lambda row, ids: tokens[row, len(ids) - prompt, None].tolist()
    out = root.generate(
        **_copied(inputs),
        **ONE_ANSWER,
        max_new_tokens=steps + 1,
        min_new_tokens=steps + 1,
        stop_strings=None,
        cache_implementation="dynamic",
        output_logits=True,
        return_dict_in_generate=True,
        prefix_allowed_tokens_fn=forced,
    )
    return torch.stack(out.logits, 1), out.sequences[:, prompt:]


def _uncached(model: nn.Module, inputs: Mapping[str, Any], tokens: Tensor) -> Tensor:
    """The logits of `generate_logits` with these `tokens`, from one forward without a cache."""
    longer = _copied(inputs)
    adapter = adapter_for(root_model(model).config.model_type)
    of_new = {"attention_mask": 1, **adapter.inputs_of_answers}
    shape, tokens = inputs["input_ids"].shape, tokens[:, :-1]
    for name, value in inputs.items():
        # Whatever goes along with the tokens is that of an answer after the prompt.
        if torch.is_tensor(value) and value.shape == shape:
            fill = tokens if name == "input_ids" else value.new_full(tokens.shape, of_new.get(name, 0))
            longer[name] = torch.cat([value, fill], 1)
    for name in longer.keys() & set(adapter.repeated_in_answers):
        longer[name] = torch.cat([longer[name], longer[name][:, -1:].repeat_interleave(tokens.shape[1], 1)], 1)
    logits: Tensor = model(**longer, use_cache=False).logits
    return logits[:, shape[1] - 1 :]


def _copied(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if torch.is_tensor(value) else value for name, value in inputs.items()}


def check_finite(dense: Tensor, gazed: Tensor) -> None:
    """Refuse logits that cannot be compared: of NaN, the first token would be the most likely one on both sides.

    Raises:
        ConfigError: Some are infinite or NaN.
    """
    for how, logits in (("dense", dense), ("with gaze", gazed)):
        if not bool(logits.isfinite().all()):
            raise ConfigError(
                f"expected logits to compare, got NaN or infinity from the model {how}, in {logits.dtype}: load it "
                "with another dtype, such as dtype='float32', or get a new copy of its weights"
            )


def _gap(a: Tensor, b: Tensor) -> float:
    return (a.float() - b.float()).abs().max().item()


def _gap_of_most(a: Tensor, b: Tensor) -> float:
    """The largest difference without one step in five, which may differ `SLACK` times as much; NaN if there is any."""
    gaps = (a.float() - b.float()).abs().amax((0, 2)).sort().values
    return max(gaps[-1 - len(gaps) // 5].item(), gaps[-1].item() / SLACK) if gaps.isfinite().all() else float("nan")


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything about a model and transformers' registries that patching could leave changed."""
    root = root_model(model)
    marks: dict[str, Any] = {
        "attention registry": _registered(AttentionInterface, root),
        "mask registry": _registered(AttentionMaskInterface, root),
        "config": root.config.to_dict(),
    }
    for name, module in root.named_modules():
        marks[f"attributes of {name}"] = sorted(vars(module))
        marks[f"class of {name}"] = type(module)
        marks[f"class attributes of {name}"] = sorted(vars(type(module)))
        for hooks in ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_forward_hooks_always_called"):
            marks[f"{hooks} of {name}"] = list(getattr(module, hooks))
        if (config := getattr(module, "config", None)) is not None:
            marks[f"attention of {name}"] = getattr(config, "_attn_implementation", None)
    return marks


def _registered(registry: Any, root: Any) -> list[str]:
    """Names in a registry of transformers, without those of other patched models, which come and go."""
    owners = {name: getattr(function, "__self__", None) for name, function in registry._global_mapping.items()}
    return sorted(
        name
        for name, owner in owners.items()
        if not isinstance(owner, GazeAttention) or owner.runtime.model_config is root.config
    )


def _changes(before: dict[str, Any], after: dict[str, Any]) -> float:
    return float(sum(before.get(name) != after.get(name) for name in before.keys() | after.keys()))
