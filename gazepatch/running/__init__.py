"""A patched model while it runs: its hooks, what they know of the running forward, and the attention that asks for it.

In the order in which a forward meets them:

- `capture` sees images and token ids, and `runtime` keeps what is known of the model and of each thread's forward.
- `decoder` stands at the door of the text decoder. There `starting` makes the record of a `forward`, for which
  `locating` finds the visual tokens. Where images are the keys of cross-attention layers, `cross_attention` makes a
  second record, and `repeating` follows the mask that says who sees them.
- `attention` is what the layers call, with a `call` that `arguments` and `masks` read: a decode step that gazes reads
  by a plan, anything else is the model's own attention, after which `prompt` does some queries again.
- `checkpointing` hands the record on to layers that run once more for their gradients.
- `changes` puts all of it into a model, and takes it out.
"""
