"""Launch settings of the decode kernel, by architecture, padded head dim and bytes per element.

UNMEASURED, but for architectures that a note below says more of: reasoned from shared memory, registers and the bytes
that must be in flight. `benchmarks/tune.py --write` puts measured ones here.
"""

from __future__ import annotations

#: (architecture, head dim, bytes) -> `gazepatch.kernels.settings.Tuned`
#: cuda90, head dim 128, 2 bytes: measured on NVIDIA H200, triton 3.6.0, with the kernel as it was before
DECODE: dict[tuple[str, int, int], tuple[int, int, int, int, bool]] = {
    ("cuda80", 64, 2): (64, 4, 4, 2, False),
    ("cuda80", 128, 2): (64, 4, 3, 2, False),
    ("cuda80", 256, 2): (32, 4, 3, 2, False),
    ("cuda80", 64, 4): (64, 4, 3, 2, False),
    ("cuda80", 128, 4): (32, 8, 2, 2, False),
    ("cuda80", 256, 4): (16, 8, 2, 2, False),
    ("cuda90", 64, 2): (64, 4, 4, 2, False),
    ("cuda90", 128, 2): (32, 2, 3, 4, True),
    ("cuda90", 256, 2): (32, 4, 3, 2, False),
    ("cuda90", 64, 4): (64, 4, 3, 2, False),
    ("cuda90", 128, 4): (32, 8, 2, 2, False),
    ("cuda90", 256, 4): (16, 8, 2, 2, False),
    ("gfx942", 64, 2): (64, 4, 2, 2, False),
    ("gfx942", 128, 2): (64, 4, 2, 2, False),
    ("gfx942", 256, 2): (32, 4, 2, 2, False),
    ("gfx942", 64, 4): (64, 4, 2, 2, False),
    ("gfx942", 128, 4): (32, 4, 2, 2, False),
    ("gfx942", 256, 4): (16, 4, 2, 2, False),
}
