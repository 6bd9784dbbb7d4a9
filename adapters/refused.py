"""Model types that read images and cannot gaze, with the reason."""

from __future__ import annotations

_SPARSE = "an indexer of its own already picks the keys that its layers of full attention read"
_ENCODER = "its images stay in an encoder: there are no visual tokens in the decoder's sequence"
_FEW = "its images are a handful of query vectors: too few to choose among"

REFUSED = {
    "blip": "it has attention of its own, which no other can stand in for",
    "blip-2": _FEW,
    "diffusion_gemma": "it writes blocks of tokens by diffusion, not one token after the other",
    "dots3_note": _SPARSE,
    "evolla": "it reads proteins, not images",
    "florence2": _ENCODER,
    "git": "it puts its images in front of the sequence itself, and has attention of its own",
    "glm5_next": _SPARSE,
    "hy_v4_vl": _SPARSE,
    "idefics": "its cross-attention makes all keys anew at every step, mostly of a few latents: nothing would be saved",
    "instructblip": _FEW,
    "instructblipvideo": _FEW,
    "kosmos-2": "its decoder places images itself, by a mask instead of token ids",
    "kosmos-2.5": "its decoder places images itself, by a mask instead of token ids",
    "mistral4": "it is a text decoder alone: with a vision tower it is a mistral3",
    "mistral_large4": _SPARSE,
    "pi0": "it writes movements, not text",
    "pix2struct": _ENCODER,
    "pp_formulanet": _ENCODER,
    "qwen4_exp": _SPARSE,
    "t5gemma2": _ENCODER,
    "udop": _ENCODER,
    "vision-encoder-decoder": _ENCODER,
}
