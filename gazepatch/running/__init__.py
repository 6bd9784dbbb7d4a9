"""A patched model while it runs: its hooks, what they know of the running forward, and the attention that asks for it.

`capture` sees images and token ids. `decoder` stands at the door of the text decoder, where `starting` finds the visual
tokens and makes the record of a `forward` (`across`: where images are keys of cross-attention layers, whose mask
`repeating` follows). `attention` is what the layers call then: a decode step that gazes reads by a plan, anything else
is the model's own attention, after which `prompt` does some queries again. `changes` puts all of
it into a model, and takes it out.
"""
