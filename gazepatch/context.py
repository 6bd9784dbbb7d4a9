"""The embeddings of context tokens: weights, which are made, checked, read from safetensors and written to them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gazepatch.config import GazeConfig
from gazepatch.errors import ArtefactError, ConfigError
from gazepatch.files import replace_file

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Of the file that holds them.
TOKENS_NAME = "context_tokens.safetensors"

TENSOR = "context_tokens"
FORMAT = "1"

#: Words that untrained context tokens are made to resemble.
SAMPLE = 4096

#: A file is refused above this size before it is opened: 4,096 tokens of 16,384 float32 numbers.
MAX_BYTES = 1 << 28


def initial_context_tokens(model: Any, count: int, *, seed: int = 0) -> Tensor:
    """Untrained context tokens to start a training from: `[count, hidden]` float32, spread like the model's own words.

    Args:
        model: A vision-language model of transformers.
        count: M, at least 1.
        seed: Of the random numbers.

    Raises:
        ConfigError: `count` is not a positive integer.
    """
    import torch

    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ConfigError(f"count must be an integer of at least 1, got {count!r}")
    words = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randint(words.weight.shape[0], (SAMPLE,), generator=generator)
    with torch.no_grad():  # as the decoder sees them: some families scale their embeddings
        # Where accelerate keeps the table elsewhere, its hook takes the sample along.
        vectors = words(sample if words.weight.is_meta else sample.to(words.weight.device)).float()
    noise = torch.randn(count, vectors.shape[1], generator=generator).to(vectors.device)
    tokens: Tensor = vectors.mean(0) + noise * vectors.std(0)
    return tokens


def checked(tokens: Any, hidden_size: int, name: str = "context_tokens") -> Tensor:
    """`tokens` if they are `[M, hidden_size]` finite floating-point numbers of 16 bits or more.

    Raises:
        ConfigError: They are anything else.
    """
    import torch

    if not torch.is_tensor(tokens):
        raise ConfigError(
            f"{name} must be a tensor [M, {hidden_size}] or the path of a {TOKENS_NAME}, got {type(tokens).__name__}; "
            "untrained ones to start from: gazepatch.initial_context_tokens(model, count)"
        )
    if tokens.dim() != 2 or tokens.shape[1] != hidden_size or not len(tokens):
        raise ConfigError(f"{name} must have the shape [M, {hidden_size}] with M >= 1, got {list(tokens.shape)}")
    if tokens.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ConfigError(
            f"{name} must be floating-point numbers, got {tokens.dtype}: give float32, or another of 16 bits or more"
        )
    if not bool(torch.isfinite(tokens).all()):
        raise ConfigError(f"{name} must be finite, got NaN or infinity among them: the training that made them failed")
    return tokens


def read_context_tokens(path: str | Path, model_type: str, hidden_size: int) -> Tensor:
    """The context tokens of a file, `[M, hidden_size]`, everything about them checked.

    Raises:
        ArtefactError: There is no such file, or it is damaged, or made for another model.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    path = path / TOKENS_NAME if path.is_dir() else path
    if not path.is_file():
        raise ArtefactError(f"expected a file {TOKENS_NAME}, got nothing at {path}")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ArtefactError(f"{path} has {size} bytes, context tokens have at most {MAX_BYTES}: this is another file")
    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
            tokens = file.get_tensor(TENSOR) if names == [TENSOR] else None
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtefactError(f"{path} is not a valid safetensors file: {error}; get a new copy") from None
    if tokens is None:
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise ArtefactError(f"{path} must hold one tensor, {TENSOR}, got {listed or 'none'}")
    for key, expected in _metadata(model_type, hidden_size).items():
        if (found := metadata.get(key)) != expected:
            raise ArtefactError(f"{path} must have {key} {expected} in its metadata, as the model has, got {found}")
    try:
        return checked(tokens, hidden_size, str(path))
    except ConfigError as error:
        raise ArtefactError(str(error)) from None


def with_context_tokens(
    config: GazeConfig, given: Tensor | str | Path | None, model_type: str, hidden_size: int
) -> tuple[GazeConfig, Tensor | None]:
    """Settings and context tokens that agree on M, out of what a user gave: a tensor, a file, or nothing.

    Raises:
        ConfigError: They do not fit each other, or the tokens not the model.
        ArtefactError: The file is damaged, or made for another model.
    """
    if isinstance(given, (str, Path)):
        given = read_context_tokens(given, model_type, hidden_size)
    if given is None and not config.context_tokens:
        return config, None
    if given is None:
        raise ConfigError(
            f"the settings ask for {config.context_tokens} context tokens, which are trained weights, and none were "
            "given: pass context_tokens=..., a file or a tensor, or set GazeConfig(context_tokens=0); to train some, "
            "start from gazepatch.initial_context_tokens(model, count)"
        )
    tokens = checked(given, hidden_size)
    if config.context_tokens not in (0, len(tokens)):
        raise ConfigError(f"the settings ask for {config.context_tokens} context tokens, got {len(tokens)}")
    return replace(config, context_tokens=len(tokens)), tokens


def write_context_tokens(path: str | Path, tokens: Tensor, model_type: str) -> None:
    """Write `[M, hidden]` context tokens; the file appears complete or not at all."""
    from safetensors.torch import save

    data = save({TENSOR: tokens.detach().cpu().contiguous()}, metadata=_metadata(model_type, tokens.shape[1]))
    replace_file(Path(path), data)  # save_file would make a file that nobody else may read


def parameter(tokens: Tensor, decoder: nn.Module) -> nn.Parameter:
    """A copy of the tokens as a parameter of the decoder's dtype and device, or `tokens` if they are one already."""
    from torch import nn

    if isinstance(tokens, nn.Parameter):
        return tokens
    table = decoder.get_input_embeddings().weight  # type: ignore[operator]
    dtype = table.dtype if table.is_floating_point() else tokens.dtype
    device = tokens.device if table.is_meta else table.device  # a table that accelerate brings in for its layer alone
    return nn.Parameter(tokens.detach().clone().to(device, dtype))


def _metadata(model_type: str, hidden_size: int) -> dict[str, str]:
    return {"format": FORMAT, "model_type": model_type, "hidden_size": str(hidden_size)}
