"""Every family, with images, with videos, and in a batch, against transformers' own results."""

from __future__ import annotations

import pytest
from tiny import FAMILIES, VIDEO, Case, batch, built

from gazepatch.conformance import AdapterConformance

KINDS = [(name, kind) for name in FAMILIES for kind in ("image", "video", "batch") if kind != "video" or name in VIDEO]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def case(request: pytest.FixtureRequest) -> Case:
    name, kind = request.param
    made = built(name, kind == "video")
    return batch(made) if kind == "batch" else made


class TestFamilies(AdapterConformance):
    pass
