"""What gazepatch must know of an architecture: the questions asked of a family, with the answers most families give.

An adapter holds facts and no state: where the vision tokens of a prompt sit, which decoder layers can gaze, where the
text decoder is. It never touches a model. A new family is usually a few lines: see `gazepatch/adapters/llava.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from gazepatch.layout import Media, Span, place, place_runs, runs

# The arguments of the model's own get_image_features ("image") and get_video_features ("video"), as they were called.
Captured = Mapping[str, Mapping[str, Any]]

FULL_ATTENTION = "full_attention"


class Adapter:
    """Facts about the model types in `model_types`."""

    model_types: ClassVar[tuple[str, ...]]
    #: Names in the configuration of the token ids that carry vision features, by modality.
    token_id_names: ClassVar[Mapping[str, tuple[str, ...]]] = {"image": ("image_token_id",), "video": ("video_token_id",)}
    #: Grids of video frames are known to be joined in one run, or one run a frame; None where there is no video.
    video: ClassVar[str | None] = None

    # ---- the decoder

    def text_config(self, config: Any) -> Any:
        """Configuration of the text decoder, out of that of the whole model."""
        return config.get_text_config(decoder=True)

    def decoder(self, model: Any) -> Any:
        """The stack of decoder layers that gets `inputs_embeds`: `get_decoder()` without a language-model head."""
        decoder = model.get_decoder()
        inner = getattr(decoder, "base_model_prefix", "")
        return getattr(decoder, inner) if decoder.get_output_embeddings() is not None and inner else decoder

    def dense_reasons(self, config: Any) -> dict[int, str]:
        """For every decoder layer that cannot gaze, by index: why not."""
        text = self.text_config(config)
        if reason := _reads_beyond_keys(text):
            return dict.fromkeys(range(text.num_hidden_layers), reason)
        return {i: f"{kind} layer" for i, kind in enumerate(_layer_types(text)) if kind != FULL_ATTENTION}

    # ---- the sequence

    def token_ids(self, config: Any, modality: str) -> tuple[int, ...]:
        """Token ids whose embeddings are replaced by features of `modality`; empty where the family has none."""
        values = (getattr(config, name, None) for name in self.token_id_names.get(modality, ()))
        return tuple(value for value in values if value is not None)

    def media(self, config: Any, modality: str, captured: Mapping[str, Any]) -> Sequence[Media] | None:
        """The images or videos of a batch, in order, from the arguments their features were made from.

        `None` where the arguments do not tell, and each run of tokens is judged by `run`.
        """
        return None

    def run(self, config: Any, modality: str, tokens: int) -> Sequence[Media] | None:
        """What a run of `tokens` vision tokens holds, judged by its length. `None`: cannot be known."""
        return None

    def locate(self, config: Any, ids: Sequence[Sequence[int]], captured: Captured) -> list[Span]:
        """Spans of every row of `ids`, by row and position.

        Rows that generation repeated (beams, several answers) share the images of the first.
        """
        spans = [span for modality in ("image", "video") for span in self._locate(config, modality, ids, captured)]
        return sorted(spans, key=lambda span: (span.row, span.start))

    def _locate(self, config: Any, modality: str, ids: Sequence[Sequence[int]], captured: Captured) -> list[Span]:
        if not (token_ids := self.token_ids(config, modality)):
            return []
        found = [runs(row, token_ids) for row in ids]
        media = self.media(config, modality, captured[modality]) if modality in captured else None
        if media is not None:
            for repeats in (False, True):
                if (spans := _place_rows(iter(media), ids, found, repeats)) is not None:
                    return spans
        return [
            span
            for row, of_row in enumerate(found)
            for span in place_runs(of_row, lambda tokens: self.run(config, modality, tokens), row)
        ]


def _place_rows(
    media: Iterator[Media], ids: Sequence[Sequence[int]], found: Sequence[Sequence[tuple[int, int]]], repeats: bool
) -> list[Span] | None:
    """Spans of all rows when `media` is used up exactly; with `repeats`, a row equal to the one above shares its media."""
    spans: list[Span] = []
    latest: list[Media] = []
    for row, of_row in enumerate(found):
        if not (repeats and row and ids[row] == ids[row - 1]):
            latest = []
            source: Iterator[Media] = _remember(media, latest)
        else:
            source = iter(latest)
        placed = place(source, of_row, row)
        if placed is None:
            return None
        spans += placed
    return spans if next(media, None) is None else None


def _remember(media: Iterator[Media], latest: list[Media]) -> Iterator[Media]:
    for item in media:
        latest.append(item)
        yield item


def _layer_types(text: Any) -> list[str]:
    """The kind of attention of every layer, in transformers' words."""
    if (types := getattr(text, "layer_types", None)) is not None:
        return list(types)
    # Configurations without layer_types window all layers or none (Mistral).
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    return ["sliding_attention" if window else FULL_ATTENTION] * text.num_hidden_layers


def _reads_beyond_keys(text: Any) -> str | None:
    """Why no layer of this text decoder can gaze: its attention scores are more than scaled dot products."""
    if getattr(text, "attn_logit_softcapping", None) is not None:
        return "attention scores are soft-capped"
    if text.model_type == "gpt_oss":
        return "attention has sinks"
    return None
