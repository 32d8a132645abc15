"""Labels for tokens: an encoder as transformers has them, packed and padded rows, saved and opened by AutoModel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import randomised, tiny
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForTokenClassification
from transformers.loss.loss_utils import ForTokenClassification

import manyheads.models
from manyheads.compare.train import has_place
from manyheads.models import ManyheadsForTokenClassification

IDS = torch.randint(0, 16, (2, 7), generator=torch.Generator().manual_seed(0))


def tagger(*names: str, **settings: Any) -> ManyheadsForTokenClassification:
    return randomised(ManyheadsForTokenClassification(tiny(*(names or ("softmax",)), num_labels=3, **settings))).eval()


@torch.no_grad()
def test_tokens_see_both_sides_of_their_own_document() -> None:
    model = tagger()
    whole = model(IDS).logits
    changed = IDS.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 16
    assert bool((model(changed).logits[:, 0] != whole[:, 0]).any())
    alone = [model(IDS[:1, :4]).logits, model(IDS[:1, 4:]).logits]
    packed = model(IDS[:1], position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2]])).logits
    assert_close(packed, torch.cat(alone, 1), rtol=1e-10, atol=1e-10)
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), IDS[:1]], 1)
    mask = torch.tensor([[0, 0] + [1] * 7])
    left = model(padded, attention_mask=mask, position_ids=mask.cumsum(1).sub(1).clamp(min=0)).logits
    assert_close(left[:, 2:], whole[:1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("items", [None, 5])
def test_the_loss_is_that_of_transformers(items: int | None) -> None:
    model = tagger()
    labels = IDS % 3
    labels[0, :3] = -100
    out = model(IDS, labels=labels, num_items_in_batch=items)
    given = {} if items is None else {"num_items_in_batch": items}
    wanted = ForTokenClassification(out.logits, labels, model.config, **given)
    assert_close(out.loss, wanted.to(out.loss.dtype), rtol=1e-6, atol=1e-6)


def test_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels \[2, 6\] for \[2, 7\] tokens; want one for each"):
        tagger()(IDS, labels=IDS[:, 1:])


@torch.no_grad()
def test_it_is_saved_and_opened_with_its_body(tmp_path: Path) -> None:
    model = tagger()
    model.save_pretrained(tmp_path)
    again = AutoModelForTokenClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(again) is ManyheadsForTokenClassification
    assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-12, atol=1e-12)
    body = manyheads.models.ManyheadsBody.from_pretrained(tmp_path, dtype=torch.float64)
    found: Tensor = body(IDS).last_hidden_state
    assert_close(again.classifier(found), model(IDS).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("task", ["communities", "masked-text"])
def test_what_pools_has_no_place_where_every_token_has_a_label(task: str) -> None:
    assert not has_place(manyheads_task(task), "acmil")


def manyheads_task(name: str) -> Any:
    from manyheads.tasks import task_class

    return task_class(name)
