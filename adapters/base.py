"""What gazepatch must know of an architecture: the questions asked of a family, with the answers most families give.

An adapter holds facts and no state: where the vision tokens of a prompt sit, which decoder layers can gaze, where the
text decoder is. It never touches a model. A new family is usually one line in the table of its layout, see
`gazepatch/adapters/squares.py`; a new layout is a subclass with one method, `media` or `run`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gazepatch.layout import Media, Span, features, lay, number_together, runs, share_out

# By modality: the arguments of the model's own get_image_features or get_video_features as it was called, by name,
# those of its **kwargs among them.
Captured = Mapping[str, Mapping[str, Any]]

FULL_ATTENTION = "full_attention"
HYBRID = "hybrid"
LOCAL = ("sliding_attention", "chunked_attention")

# Words that several families share.
FULL_ONLY = "full attention only"
RECURRENT = "recurrent layers would carry them along"
CONVOLUTIONS = "its short convolutions would mix them into text"

# `Adapter.token_id_names` of families whose videos have the tokens of images.
AS_IMAGES = {"image": ("image_token_id",), "video": ("image_token_id",)}

# Text decoders whose caches get latents and rotated keys, of which their attention modules make the keys and values of
# all heads: linearly, by a method `expand_kv` (MLA).
LATENT = ("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "mistral4", "sarvam_mla", "youtu")

# Text decoders that run layers several times a token: the first, the one after the last, and how often. Each time they
# have keys of their own, in copies of the cache's layers after all others; their attention is told by `cache_offset`.
LOOPS: Mapping[str, Callable[[Any], tuple[int, int, int]]] = {
    "dory": lambda text: (text.n_input_layers, text.num_hidden_layers - text.n_output_layers, text.n_recurrent_loops),
    "inkling2_loop_text": lambda text: (text.loop_layer_index_start, text.loop_layer_index_end, text.loop_num_passes),
}

# Text decoders that do more with cached keys and values than hand them to an attention function.
OWN_ATTENTION: Mapping[str, str] = {
    "diffllama": "its layers split the cached values, and attend twice",
    "doge": "its layers make a mask of the cached values",
    "hrm_text": "its layers run several times a token, each time with other keys in the cache",
    "jetmoe": "its layers repeat the cached keys for each of their experts",
    "xglm": "its layers attend by themselves",
}


class Adapter:
    """Facts about the model types in `model_types`."""

    model_types: tuple[str, ...]
    #: How images become tokens, and videos, in a few words for people; empty where the family has none.
    images: str = "images"
    videos: str = ""
    #: Whether the tokens of an image form a grid; otherwise regions are runs of tokens.
    grid: bool = True
    #: Which layers gaze, in a few words.
    layers: str = "all"
    #: What goes along with the tokens of an answer, where it is not that of text in a prompt.
    inputs_of_answers: Mapping[str, int] = {}
    #: Why context tokens would change more than they should; empty where they are exact.
    no_context: str = ""
    #: Inputs with an entry for each token, on their second axis, which stays the same throughout an answer.
    repeated_in_answers: tuple[str, ...] = ()
    #: Whether images are the keys of cross-attention layers, and no tokens of the sequence.
    cross_attention: bool = False
    #: The decoder's arguments, for such families: what these layers make keys of, `[..., hidden]`, and who sees them.
    cross_states: str = "cross_attention_states"
    cross_mask: str = "cross_attention_mask"
    #: Names in the configuration of the token ids that carry vision features, by modality.
    token_id_names: Mapping[str, tuple[str, ...]] = {"image": ("image_token_id",), "video": ("video_token_id",)}

    # ---- the decoder

    def text_config(self, config: Any) -> Any:
        """Configuration of the text decoder, out of that of the whole model."""
        return config.get_text_config(decoder=True)

    def decoder(self, model: Any) -> Any:
        """The stack of decoder layers that gets `inputs_embeds`: `get_decoder()` without a language-model head."""
        decoder = model.get_decoder()
        if decoder.get_output_embeddings() is None:
            return decoder
        inner = decoder.base_model
        return decoder.model if inner is decoder else inner  # Llama 4 names another module as its base

    def dense_reasons(self, config: Any) -> dict[int, str]:
        """For every decoder layer that cannot gaze, by index: why not."""
        text = self.text_config(config)
        if reason := _beyond_dot_products(text):
            return dict.fromkeys(range(text.num_hidden_layers), reason)
        return {i: f"{kind} layer" for i, kind in enumerate(_layer_types(text)) if kind != FULL_ATTENTION}

    def cache_layers(self, config: Any) -> list[int]:
        """The decoder layer behind each number that a cache has for one: several for layers of `LOOPS`."""
        text = self.text_config(config)
        start, stop, times = LOOPS[text.model_type](text) if text.model_type in LOOPS else (0, 0, 1)
        layers = list(range(text.num_hidden_layers))
        return layers + layers[start:stop] * (times - 1)

    def cross_layers(self, config: Any) -> tuple[int, ...]:
        """Decoder layers whose keys are images instead of the sequence, by index: with `cross_attention`."""
        return ()

    def cross_spans(self, config: Any, keys: int) -> list[Span]:
        """Where images are among `keys` keys of such a layer, those of one row: with `cross_attention`."""
        raise NotImplementedError

    def store_layers(self, config: Any) -> dict[int, int]:
        """For every decoder layer that reads the keys of another one, by index: that layer (Gemma 3n)."""
        text = self.text_config(config)
        types, shared = _layer_types(text), getattr(text, "num_kv_shared_layers", None) or 0
        storing = {kind: i for i, kind in enumerate(types[: len(types) - shared])}
        return {i: storing[types[i]] for i in range(len(types) - shared, len(types))}

    def latent(self, config: Any) -> bool:
        """Whether the cache holds latents, of which attention modules make keys and values by `expand_kv` (MLA)."""
        return self.text_config(config).model_type in LATENT

    def context_reason(self, config: Any) -> str:
        """Why context tokens would change more than they should in a model of this configuration; empty: they do not.

        Besides the family itself its text decoder may not take them: any can be put under a LLaVA.
        """
        others = sorted(set(_layer_types(self.text_config(config))) - {FULL_ATTENTION, *LOCAL})
        return self.no_context or (f"its {' and '.join(others)} layers would count them" if others else "")

    # ---- the sequence

    def token_ids(self, config: Any, modality: str) -> tuple[int, ...]:
        """Token ids whose embeddings are replaced by features of `modality`; empty where the family has none."""
        values = (getattr(config, name, None) for name in self.token_id_names.get(modality, ()))
        return tuple(value for value in values if value is not None)

    def positions(self, config: Any, modality: str, ids: Sequence[int]) -> list[int]:
        """Positions in one row that carry features of `modality`, in the order of the features."""
        wanted = set(self.token_ids(config, modality))
        return [position for position, token in enumerate(ids) if token in wanted]

    def media(self, config: Any, modality: str, call: Mapping[str, Any]) -> Sequence[Media] | None:
        """The images or videos of a batch, in order, from the arguments their features were made from.

        `None` where the arguments do not tell, and each run of tokens is judged by `run`.
        """
        return None

    def run(self, config: Any, modality: str, tokens: int) -> Sequence[Media] | None:
        """The images or videos in a run of `tokens` vision tokens, judged by its length. `None`: cannot be known."""
        return None

    def locate(self, config: Any, ids: Sequence[Sequence[int]], captured: Captured) -> list[Span]:
        """Spans of every row of `ids`, by row and position. What cannot be explained has no grid, one span a run."""
        return number_together(self._locate(config, modality, ids, captured) for modality in ("image", "video"))

    def _locate(self, config: Any, modality: str, ids: Sequence[Sequence[int]], captured: Captured) -> list[Span]:
        tokens = [self.positions(config, modality, row) for row in ids]
        if not any(tokens):
            return []
        media = (self.media(config, modality, captured[modality]) if modality in captured else None) or ()
        copies = _copies(ids, sum(map(len, tokens)), features(media))
        shares = share_out(media, [len(row) for row in tokens[::copies]])
        if media and shares is not None:
            return [span for row, found in enumerate(tokens) for span in lay(shares[row // copies], found, row)]
        return [
            span
            for row, found in enumerate(tokens)
            for run in runs(found)
            for span in self._judge(config, modality, media, run, row, len(ids[row]))
        ]

    def _judge(
        self, config: Any, modality: str, media: Sequence[Media], run: tuple[int, int], row: int, row_length: int
    ) -> list[Span]:
        """Spans of one run whose images are not known by their place in the batch."""
        start, stop = run
        guess = self.run(config, modality, stop - start)
        # A run at the edge of the row may be cut off there (chunked prefill), so its length tells nothing.
        if guess is None and start > 0 and stop < row_length:
            guess = _only_fit(media, stop - start)
        if guess is None or features(guess) != stop - start:
            return [Span(row, start, stop, grid=None, media=start)]
        return lay(guess, range(start, stop), row, first=start)


@dataclass(frozen=True)
class Declared(Adapter):
    """An adapter whose facts are arguments, so that a family is a line in the table of its layout."""

    model_types: tuple[str, ...]
    images: str = field(default="", kw_only=True)
    videos: str = field(default="", kw_only=True)
    layers: str = field(default="all", kw_only=True)
    no_context: str = field(default="", kw_only=True)


def between(ids: Sequence[int], start: int, end: int, token: int, modality: str) -> list[int]:
    """Positions of a `token` that stands for frames of videos between `start` and `end`, and for images elsewhere."""
    inside, found = False, []
    for position, each in enumerate(ids):
        if each in (start, end):
            inside = each == start
        elif each == token and inside == (modality == "video"):
            found.append(position)
    return found


def hybrid_reasons(text: Any) -> dict[int, str]:
    """`Adapter.dense_reasons` of a text decoder whose layers of full attention are called hybrid."""
    return {i: f"{kind} layer" for i, kind in enumerate(_layer_types(text)) if kind != HYBRID}


def integers(value: Any) -> Any:
    """Nested lists of integers, out of a tensor, an array or sequences of them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [integers(item) for item in value] if isinstance(value, (list, tuple)) else value


def _copies(ids: Sequence[Sequence[int]], tokens: int, expected: int) -> int:
    """How often generation repeats each row (beams, several answers) over what the images of the batch account for."""
    copies, rest = divmod(tokens, expected or 1)
    if rest or copies < 2 or len(ids) % copies:
        return 1
    repeated = all(list(row) == list(ids[i - i % copies]) for i, row in enumerate(ids))
    return copies if repeated else 1


def _only_fit(media: Sequence[Media], tokens: int) -> Sequence[Media] | None:
    """The one layout among `media` that fills `tokens` tokens; `None` if there is none, or several that differ."""
    fits = {tuple(pieces) for pieces in media if features([pieces]) == tokens}
    return list(fits) if len(fits) == 1 else None


def _layer_types(text: Any) -> list[str]:
    """The kind of attention of every layer, in transformers' words."""
    if (types := getattr(text, "layer_types", None)) is not None:
        return list(types)
    # As transformers' own caches read a configuration that does not say: all layers are alike (Mistral).
    kind = FULL_ATTENTION
    if getattr(text, "sliding_window", None):
        kind = "sliding_attention"
    elif getattr(text, "attention_chunk_size", None):
        kind = "chunked_attention"
    return [kind] * text.num_hidden_layers


def _beyond_dot_products(text: Any) -> str | None:
    """Why no layer of this text decoder can gaze: its attention is more than scaled dot products with cached keys."""
    if getattr(text, "kv_lora_rank", None) is not None and text.model_type not in LATENT:
        return "keys and values are made of latents (MLA) in a way that nobody has looked at"
    if getattr(text, "recurrent_kv_cache_mode", None) == "last_loop":
        return "layers run several times a token, and read the keys of their last run out of the cache by themselves"
    return OWN_ATTENTION.get(text.model_type)
