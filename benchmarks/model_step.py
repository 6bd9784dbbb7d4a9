"""A whole decode step of a model of Qwen2.5-VL-7B's shape: gaze and dense, on static caches, in CUDA graphs.

Weights, keys and values are random: time does not depend on them. A prompt of 128k tokens would take long, so caches
are filled directly, as a prompt would fill them. A dense cache and one of ours are never held at the same time.

Dense means the same model on transformers' `StaticCache`, with transformers' own sdpa (which reads all the room there
is through a mask, and may repeat keys and values for the query heads that share them), and with attention that reads
exactly the entries there are, without a mask, by flash and cuDNN: what a dense engine would do at best. (sdpa's
efficient backend takes ten times as long.) Ours at full budget is one more dense way: a split-KV kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from attention_tables import Case, WrongError
from attention_ways import BACKENDS, TRANSFORMERS
from comparing import best
from on_gpu import TEXT, first_line, free, graph_ms, lacking
from shapes import DEFAULTS, SETTINGS_OF_STEPS, SMALL, WANTED, WHOLE, Setup, Shape
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from gazepatch.caches.adoption import adopt
from gazepatch.caches.name import CACHE
from gazepatch.config import GazeConfig
from gazepatch.layout import Grid, Span
from gazepatch.patch import is_patched, patch_of, patched

#: Tokens there is room for after the prompt: every replay of a graph appends one.
ROOM = 64
#: The name under which transformers knows attention without a mask.
EXACT = "exactly_the_entries"
#: Dense ways: of sdpa's backends those that may be the best.
WAYS = ("flash", "cudnn", TRANSFORMERS)
#: Memory for what is neither weights nor cache.
SPARE = 1 << 30

Row = dict[str, Any]


def model_of(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    """A Qwen2.5-VL with random weights, and a vision tower that is not used."""
    third = shape.dim // 8
    text = {
        "vocab_size": shape.words,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "max_position_embeddings": 1 << 18,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [shape.dim // 2 - 3 * third, third + third // 2, 2 * third - third // 2],
        },
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 1, "out_hidden_size": shape.hidden}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    tokens = {name: shape.words - 1 - i for i, name in enumerate(names)}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def cache_bytes(setup: Setup, frames: int, batch: int) -> int:
    """Of keys and values of a prompt."""
    _, height, width = setup.grid(frames)
    tokens = frames * height * width + TEXT + ROOM
    return 2 * setup.shape.layers * batch * setup.shape.key_heads * tokens * setup.shape.dim * setup.dtype.itemsize


def filled(model: Any, grid: Grid, batch: int = 1, seed: int = 0) -> tuple[StaticCache, int]:
    """A static cache as prompts with one image or video leave it, and its tokens."""
    text, visual = model.config.text_config, grid[0] * grid[1] * grid[2]
    tokens, dim = visual + TEXT, text.hidden_size // text.num_attention_heads
    cache = StaticCache(config=text, max_cache_len=tokens + ROOM)
    state = None
    if is_patched(model):
        runtime = patch_of(model).runtime
        state = adopt(cache, runtime, runtime.config, runtime.layers)
        spans = [Span(row, TEXT // 2, TEXT // 2 + visual, grid, 0) for row in range(batch)]
        state.begin(spans, batch, tokens)
    generator = torch.Generator(model.device).manual_seed(seed)
    shape = (2, batch, text.num_key_value_heads, tokens, dim)
    for i in range(text.num_hidden_layers):
        entries = torch.empty(shape, dtype=model.dtype, device=model.device).normal_(generator=generator)
        cache.update(*entries, i)
        if state is not None and i in runtime.gaze_layers:
            query = entries.new_empty(batch, text.num_attention_heads, 0, dim)
            state.expect(i, query, text.num_key_value_heads, dim)
        del entries  # before those of the next layer are made
    if state is not None:
        state.finish(True)
    return cache, tokens


def step_with(model: Any, cache: StaticCache, tokens: int, batch: int) -> Callable[[], Tensor]:
    """A decode step as `generate` calls it, after prompts of so many tokens. `model` may be compiled."""
    device = cache.layers[0].device
    mask = (torch.arange(tokens + ROOM, device=device) <= tokens).expand(batch, 1, 1, -1)
    given = {
        "input_ids": torch.full((batch, 1), 5, device=device),
        "position_ids": torch.full((3, batch, 1), tokens, device=device),
        "attention_mask": {"full_attention": mask},
    }
    return lambda: model(**given, **{CACHE: cache}, use_cache=True).logits


def step_of(model: Any, grid: Grid, batch: int = 1) -> Callable[[], Tensor]:
    """`step_with` a cache of its own."""
    return step_with(model, *filled(model, grid, batch), batch)


def rewind(cache: StaticCache, tokens: int) -> None:
    """Forget the steps after a prompt, in an unpatched cache."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(tokens)


@contextmanager
def reading(model: Any, entries: int) -> Iterator[None]:
    """Let an unpatched model read the first `entries` of its cache, without a mask."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        output = sdpa(query, key[:, :, :entries], value[:, :, :entries], scale=scaling, enable_gqa=True)
        return output.transpose(1, 2), None

    AttentionInterface.register(EXACT, attend)
    AttentionMaskInterface.register(EXACT, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation({"text_config": EXACT})
    try:
        yield
    finally:
        model.set_attn_implementation({"text_config": "sdpa"})
        AttentionInterface._global_mapping.pop(EXACT)
        AttentionMaskInterface._global_mapping.pop(EXACT)


@torch.no_grad()
def check(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """How far the ways are from the unpatched model, in a small one: the largest difference of a logit.

    Gaze at full budget, and dense attention without a mask; gaze at a small budget has to differ.
    """
    model, grid = model_of(SMALL, dtype, device), (2, 12, 12)
    dense = step_of(model, grid, 2)
    expected = [dense() for _ in range(3)]
    cache, tokens = filled(model, grid, 2)
    with reading(model, tokens + 1), sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        error = (step_with(model, cache, tokens, 2)() - expected[0]).abs().max().item()
    with patched(model, GazeConfig(budget=1.0, min_visual_tokens=0)):
        step = step_of(model, grid, 2)
        error = max(error, *((step() - logits).abs().max().item() for logits in expected))
    with patched(model, GazeConfig(budget=0.1, min_visual_tokens=0)):
        differs = not torch.allclose(step_of(model, grid, 2)(), expected[0], atol=1e-6)
    if not error < 1e-3 or not differs:
        raise WrongError(f"a static step is wrong here: at full budget it differs by {error} from the dense one")
    return error


class Models:
    """The model of a setup, made when it is first asked for."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._model: Any = None
        self._wrong: WrongError | None = None

    @property
    def model(self) -> Any:
        """Unpatched, with transformers' sdpa. Raises WrongError, again and again, if `check` did."""
        if self._wrong is not None:
            raise self._wrong
        if self._model is None:
            try:
                check(self.setup.device)
            except WrongError as error:
                self._wrong = error.with_traceback(None)
                raise
            free()
            self._model = model_of(self.setup.shape, self.setup.dtype, self.setup.device)
        return self._model


def model_step(setup: Setup, models: Models) -> Iterator[Case]:
    """Steps of every batch and size: the largest sequences, which the figures are about, first."""
    sizes = sorted(setup.sizes.items(), key=lambda item: -item[1])
    for (size, frames), batch, side in itertools.product(
        sizes, setup.model_batches, ("dense", *WANTED, DEFAULTS, WHOLE)
    ):

        def measure(model: Any, frames: int = frames, batch: int = batch, side: str = side) -> Row:
            grid = setup.grid(frames)
            return dense_ms(model, grid, batch) if side == "dense" else gaze_ms(model, grid, batch, side)

        yield model_case(setup, models, side, size, batch, measure)


def model_case(setup: Setup, models: Models, side: str, size: str, batch: int, measure: Callable[[Any], Row]) -> Case:
    """A case that needs the model and a full cache: where they do not fit, the row says so."""

    def found() -> Row:
        model = models.model
        wanted = cache_bytes(setup, setup.sizes[size], batch)
        # Entries of a layer are made before they are stored, and sorted; means are an eighth with windows of 3 x 3.
        wanted += 2 * wanted // setup.shape.layers + (wanted // 8 if side == DEFAULTS else 0)
        reason = lacking(wanted + SPARE, setup.device, f"the cache of {batch} rows and its scratch memory")
        if reason is not None:
            return {"skipped": reason}
        with torch.no_grad():
            try:
                return measure(model)
            finally:
                free()

    return Case({"side": side, "batch": batch, "visual": size}, found)


def dense_ms(model: Any, grid: Grid, batch: int) -> Row:
    """Milliseconds of every dense way, on one cache; reasons for those that this machine does not have."""
    cache, tokens = filled(model, grid, batch)
    step = step_with(model, cache, tokens, batch)
    found: dict[str, float | str] = {}
    for way in WAYS:
        rewind(cache, tokens)
        try:
            with way_of(model, way, tokens + 1):
                found[way] = graph_ms([step])
        except Exception as error:  # said in the results; a copy that does not fit is one of them
            found[way] = first_line(error)
        free()
    return {"dense_ms": found}


@contextmanager
def way_of(model: Any, way: str, entries: int) -> Iterator[None]:
    """A dense way."""
    with (
        nullcontext() if way == TRANSFORMERS else reading(model, entries),
        nullcontext() if way == TRANSFORMERS else sdpa_kernel(BACKENDS[way]),
    ):
        yield


def gaze_ms(model: Any, grid: Grid, batch: int, side: str) -> Row:
    """Milliseconds of a step with gaze."""
    config = SETTINGS_OF_STEPS[side]
    with patched(model, config):
        return {"budget": config.budget, "ms": graph_ms([step_of(model, grid, batch)])}


def model_compiled(setup: Setup, models: Models, tables: dict[str, list[Row]]) -> Iterator[Case]:
    """The largest step with both sides compiled by torch.compile, dense in the way that was the best without."""
    size, frames = max(setup.sizes.items(), key=lambda item: item[1])
    grid = setup.grid(frames)
    for batch in setup.model_batches:

        def dense(model: Any, batch: int = batch) -> Row:
            rows = [row for row in tables.get("model_step", ()) if row["side"] == "dense" and "dense_ms" in row]
            times = next((row["dense_ms"] for row in rows if (row["batch"], row["visual"]) == (batch, size)), {})
            fastest = best({way: ms for way, ms in times.items() if way != TRANSFORMERS})
            way = "flash" if fastest is None else fastest.way
            cache, tokens = filled(model, grid, batch)
            with way_of(model, way, tokens + 1):
                return {"dense_ms": {way: _compiled_ms(setup, model, cache, tokens, batch)}}

        def gaze(model: Any, batch: int = batch) -> Row:
            with patched(model, SETTINGS_OF_STEPS["64, paper"]):
                return {"ms": _compiled_ms(setup, model, *filled(model, grid, batch), batch)}

        yield model_case(setup, models, "dense", size, batch, dense)
        yield model_case(setup, models, "64, paper", size, batch, gaze)


def _compiled_ms(setup: Setup, model: Any, cache: StaticCache, tokens: int, batch: int) -> float:
    torch._dynamo.reset()
    try:
        compiled = torch.compile(model, dynamic=False, backend=setup.compiler)
        return graph_ms([step_with(compiled, cache, tokens, batch)])
    finally:
        torch._dynamo.reset()  # what is compiled may hold the cache
