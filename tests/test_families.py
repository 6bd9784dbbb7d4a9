"""Every family, with images, with videos, and in a batch, against transformers' own results."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, VARIANTS, VIDEO, Case, batch, built, type_of
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from gazepatch.adapters.refused import REFUSED
from gazepatch.conformance import WHOLE, AdapterConformance
from gazepatch.errors import UnsupportedModelError
from gazepatch.families import families, markdown
from gazepatch.inspection import inspect
from gazepatch.patch import patched
from gazepatch.registry import MODULES, adapter_for
from gazepatch.verification import generate_logits

KINDS = [(name, kind) for name in FAMILIES for kind in ("image", "video", "batch") if kind != "video" or name in VIDEO]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def case(request: pytest.FixtureRequest) -> Case:
    name, kind = request.param
    made = built(name, kind == "video")
    return batch(made) if kind == "batch" else made


class TestFamilies(AdapterConformance):
    pass


# ---- layers that read the keys of another one


def test_a_dense_layer_may_share_the_keys_of_one_that_gazes() -> None:
    case = batch(built("gemma3n"))  # layer 3 reads the keys of layer 1
    dense, tokens = generate_logits(case.model, case.inputs, 4)
    with patched(case.model, WHOLE, dense_layers=(3,)):
        assert inspect(case.model).gaze_layers == [1]
        whole, _ = generate_logits(case.model, case.inputs, 4, tokens)
    torch.testing.assert_close(whole, dense, rtol=0, atol=2e-5)


def test_a_layer_that_shares_the_keys_of_a_dense_one_is_dense() -> None:
    case = built("gemma4")
    with pytest.raises(UnsupportedModelError, match="none of the 4 layers"), patched(case.model, dense_layers=(1,)):
        pass
    adapter = adapter_for("gemma4")
    assert adapter.store_layers(case.model.config) == {2: 0, 3: 1}


# ---- context tokens


def test_a_recurrent_decoder_takes_no_context_tokens_in_any_family() -> None:
    config = copy.copy(built("llava").model.config)
    config.text_config = built("lfm2_vl").model.config.text_config
    assert "conv layers" in adapter_for("llava").context_reason(config)
    assert not adapter_for("llava").context_reason(built("llava").model.config)


# ---- the table of families


def test_every_family_has_a_case() -> None:
    assert {type_of(name) for name in FAMILIES} == set(MODULES)
    in_videos = {t for t in MODULES if adapter_for(t).videos not in ("", "as images")}
    assert {type_of(name) for name in VIDEO} == in_videos


def test_transformers_has_no_family_that_nobody_has_looked_at() -> None:
    known = {*MODULES, *REFUSED}
    newer = sorted(set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - known)
    assert not newer, f"give these an adapter, or a reason in adapters/refused.py: {', '.join(newer)}"


def test_refused_types_say_why() -> None:
    assert not set(REFUSED) & set(MODULES)
    for model_type, why in REFUSED.items():
        with pytest.raises(UnsupportedModelError, match=re.escape(why)):
            adapter_for(model_type)


def test_the_words_of_the_table_are_true(case: Case, request: pytest.FixtureRequest) -> None:
    config = case.model.config
    adapter = adapter_for(config.model_type)
    assert all((span.grid is not None) == adapter.grid for span in case.spans)
    if request.node.callspec.params["case"][0] not in VARIANTS:  # of which some have another text decoder
        assert (adapter.layers == "all") == (not adapter.dense_reasons(config))
    assert adapter.context_reason(config) == adapter.no_context


def test_the_tables_of_the_page_are_those_of_the_adapters() -> None:
    root = Path(__file__).parents[1]
    page = (root / "docs" / "families.md").read_text(encoding="utf-8")
    table = page.partition("<!-- families -->\n")[2].partition("\n<!-- end of families -->")[0]
    assert table == markdown(families()), "put the output of `gazepatch families --markdown` there"
    number = sum(not family.refused for family in families())
    assert f"\n{number} model types, " in (root / "README.md").read_text(encoding="utf-8")


def test_the_page_on_adding_a_family_shows_what_is_there() -> None:
    root = Path(__file__).parents[1]
    page = (root / "docs" / "adding-a-family.md").read_text(encoding="utf-8")
    files = ("adapters/squares.py", "gazepatch/registry.py", "tests/tiny/tiles.py")
    there = {line.strip() for name in files for line in (root / name).read_text(encoding="utf-8").splitlines()}
    shown = [
        line.strip() for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) for line in block.splitlines()
    ]
    assert len([line for line in shown if line]) < 30
    assert [line for line in shown if line not in there and not line.startswith("FAMILIES")] == []
