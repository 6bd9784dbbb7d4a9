"""Context tokens by their definition: the call of a text decoder, lengthened in plain loops over rows and tokens.

Written from the words of the contract alone, without anything of the package but the spans:

- after the last visual token of every image or frame come M context tokens, with its position ids;
- a context token sees the visual tokens of its own image or frame, and the context tokens up to itself in it;
- everything after it sees it, in a sliding window as if it stood where the last visual token stands;
- nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gazepatch.layout import Span

#: Arguments that are lengthened in a way of their own.
BY_HAND = ("inputs_embeds", "position_ids", "attention_mask")
#: Whether queries at some positions see the keys at others, in a row whose first token is at the third.
Local = Callable[[Tensor, Tensor, int], Tensor]
HIDDEN = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Place:
    """One place of a lengthened row.

    Attributes:
        token: Position of the token, of a context token that of the last visual token of its image; -1 for padding.
        image: The image or frame that a visual or context token belongs to.
        context: Number of the context token, None for any other.
    """

    token: int
    image: int | None = None
    context: int | None = None


@dataclass
class Lengthened:
    """A decoder call with context tokens, and where the tokens of the first one are in it."""

    call: dict[str, Any]
    places: list[list[Place]]
    slots: Tensor = field(init=False)

    def __post_init__(self) -> None:
        rows = [[i for i, place in enumerate(row) if place.token >= 0 and place.context is None] for row in self.places]
        self.slots = torch.tensor(rows)

    def outer(self, hidden: Tensor) -> Tensor:
        """The hidden states of the tokens alone."""
        return torch.stack([of_row[slots] for of_row, slots in zip(hidden, self.slots, strict=True)])


def images(spans: Sequence[Span], row: int) -> list[list[int]]:
    """Positions of the visual tokens of every image or frame of a row: tiles of one image belong together."""
    found: dict[Any, list[int]] = {}
    for span in spans:
        if span.row != row:
            continue
        t, h, w = span.grid if span.grid is not None else (1, 1, span.tokens)
        position = span.start
        for frame in range(t):
            for _ in range(h):
                found.setdefault((span.media, span.frame, frame), []).extend(range(position, position + w))
                position += w + span.row_gap
    return sorted(found.values(), key=max)


def lengthened_row(spans: Sequence[Span], row: int, tokens: int, count: int) -> list[Place]:
    """The places of one row, without padding."""
    of_row = images(spans, row)
    owner = {position: image for image, positions in enumerate(of_row) for position in positions}
    places = []
    for token in range(tokens):
        places.append(Place(token, owner.get(token)))
        if token in [positions[-1] for positions in of_row]:
            places += [Place(token, owner[token], number) for number in range(count)]
    return places


def lengthened(call: Mapping[str, Any], spans: Sequence[Span], context: Tensor, config: Any) -> Lengthened:
    """A call `decoder(**call)` with the context tokens `[M, hidden]`; `config` is that of the decoder."""
    embeddings = call["inputs_embeds"]
    rows, tokens = embeddings.shape[:2]
    made = [lengthened_row(spans, row, tokens, len(context)) for row in range(rows)]
    longest = max(map(len, made))
    places = [[Place(-1)] * (longest - len(row)) + row for row in made]
    positions = call.get("position_ids")
    if positions is None:
        positions = torch.arange(tokens)[None]
    positions = positions.expand(*positions.shape[:-2], rows, tokens)
    longer = {
        **call,
        "inputs_embeds": torch.stack([embedded(embeddings[row], context, of_row) for row, of_row in enumerate(places)]),
        "position_ids": torch.stack(
            [positions[..., row, [max(p.token, 0) for p in of_row]] for row, of_row in enumerate(places)], -2
        ),
        "attention_mask": masks(call.get("attention_mask"), places, tokens, config),
        "past_key_values": None,
    }
    for name, value in call.items():
        if name not in BY_HAND and torch.is_tensor(value) and value.shape[:2] == (rows, tokens):
            longer[name] = torch.stack([along(value[row], of_row) for row, of_row in enumerate(places)])
    return Lengthened(longer, places)


def embedded(tokens: Tensor, context: Tensor, places: Sequence[Place]) -> Tensor:
    """`[S', hidden]` of one row."""
    nothing = torch.zeros_like(context[0])
    of_place = [
        nothing if p.token < 0 else tokens[p.token] if p.context is None else context[p.context] for p in places
    ]
    return torch.stack(of_place)


def along(values: Tensor, places: Sequence[Place]) -> Tensor:
    """`[S', ...]` of one row, of anything else that goes along with its tokens; context tokens have none of it."""
    nothing = torch.zeros_like(values[0])
    return torch.stack([nothing if p.token < 0 or p.context is not None else values[p.token] for p in places])


def masks(given: Any, places: Sequence[Sequence[Place]], tokens: int, config: Any) -> Any:
    """A mask of four dimensions, or one for every kind of layer."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if isinstance(given, Mapping):
        return {kind: mask(given[kind], places, tokens, None) for kind in given}
    if kinds == {"full_attention"}:
        return mask(given, places, tokens, None)
    local = {"sliding_attention": sliding(config), "chunked_attention": chunked(config)}
    return {kind: mask(given, places, tokens, local.get(kind)) for kind in kinds}


def sliding(config: Any) -> Local:
    """A query sees as many keys as a window has places."""
    return lambda query, key, first: key > query - config.sliding_window


def chunked(config: Any) -> Local:
    """A query sees its own chunk; they begin with the first token of the row."""
    return lambda query, key, first: (
        (key - first) // config.attention_chunk_size == (query - first) // config.attention_chunk_size
    )


def mask(given: Tensor | None, places: Sequence[Sequence[Place]], tokens: int, local: Local | None) -> Tensor:
    """`[B, 1, S', S']` to be added, out of a mask over tokens and, where that does not hold it, what is local."""
    sees = torch.stack([between(given, row, tokens, local) for row in range(len(places))]).tolist()
    made = []
    for row, of_row in enumerate(places):
        keys = list(enumerate(of_row))
        made.append([[0.0 if visible(query, q, key, k, sees[row]) else HIDDEN for k, key in keys] for q, query in keys])
    return torch.tensor(made)[:, None]


def visible(query: Place, q: int, key: Place, k: int, sees: Sequence[Sequence[bool]]) -> bool:
    """Whether the query at slot `q` sees the key at slot `k`, when tokens see each other as `sees` says."""
    if query.token < 0 or key.token < 0:
        return q == k  # padding sees itself, so that its softmax is one
    if not sees[query.token][key.token]:
        return False
    if query.context is not None:
        return query.image == key.image and k <= q
    return key.context is None or k < q


def between(given: Tensor | None, row: int, tokens: int, local: Local | None) -> Tensor:
    """`[S, S]` which tokens see each other without context tokens."""
    position = torch.arange(tokens)
    if given is not None and given.dim() == 4:
        of_row = given[min(row, len(given) - 1), 0]
        return of_row if of_row.dtype == torch.bool else of_row == 0
    sees = position <= position[:, None]
    if local is not None:
        first = 0 if given is None else int(given[row].argmax())
        sees = sees & local(position[:, None], position, first)
    if given is not None:
        sees = sees & given[row].bool()
    return sees


@contextmanager
def temperature_by_position(decoder: Any, places: Sequence[Sequence[Place]]) -> Iterator[None]:
    """Llama 4 sharpens queries of layers without rotary embedding the later they are, counting what it is given."""
    tokens = torch.tensor([[max(place.token, 0) for place in row] for row in places])
    tuned = [m for m in decoder.modules() if getattr(m, "attn_temperature_tuning", False) and not m.use_rope]

    def sharpened(module: Any, queries: Tensor) -> Tensor:
        steps = torch.floor((tokens + 1.0) / module.floor_scale)
        return queries * (torch.log1p(steps) * module.attn_scale + 1.0)[..., None]

    hooks = [m.q_proj.register_forward_hook(lambda _, args, out, m=m: sharpened(m, out)) for m in tuned]
    for module in tuned:
        module.attn_temperature_tuning = False
    try:
        yield
    finally:
        for module, hook in zip(tuned, hooks, strict=True):
            module.attn_temperature_tuning = True
            hook.remove()
