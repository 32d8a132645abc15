"""VMTC + CMAI, as far as it is ours: clusters and focus against loops, and what the model then computes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from vision_hosts import IMAGE, batch, llava

from manyheads.hosts.taps import record
from manyheads.steer.method import Prompt, method
from manyheads.steer.thinning.vmtc import clustered, clusters

GIVEN = batch()


def test_clusters_are_density_peaks_as_by_loops() -> None:
    torch.manual_seed(1)
    tokens = torch.randn(12, 3, dtype=torch.float64)
    n, count, k = 12, 4, 3

    def apart(i: int, j: int) -> float:
        return float((tokens[i] - tokens[j]).norm()) / math.sqrt(3)

    density = []
    for i in range(n):
        near = sorted(apart(i, j) for j in range(n) if j != i)[:k]
        density.append(math.exp(-sum(d * d for d in near) / k))
    worth = []
    for i in range(n):
        denser = [apart(i, j) for j in range(n) if density[j] > density[i]]
        worth.append(density[i] * (min(denser) if denser else max(apart(i, j) for j in range(n))))
    centres = sorted(sorted(range(n), key=lambda i: -worth[i])[:count])
    wanted = [i if i in centres else min(centres, key=lambda c: apart(i, c)) for i in range(n)]
    assert clusters(tokens, count, k).tolist() == wanted


def test_the_main_tokens_stay_and_the_rest_is_its_clusters() -> None:
    model, seen = llava(), []
    hook = model.model.language_model.layers[0].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    with torch.no_grad():
        with clustered(model, 0.3, 0.2) as thinning:
            model(**GIVEN)
        with record(model, stack="vision") as calls:
            model(**GIVEN)
    hook.remove()
    few, whole = seen
    # ceil(0.3 * 9) = 3 stay, ceil(0.2 * 9) = 2 clusters of the other six.
    assert thinning.image_tokens == [[5, 5]] * 4
    to = calls[-1].weights().mean(1)[0, 0, 1:]
    main = sorted(range(9), key=lambda i: -float(to[i]))[:3]
    rest = [i for i in range(9) if i not in main]
    own = clusters(whole[0, 3:12][rest].float(), 2).tolist()
    rows = {3 + i: whole[0, 3 + i] for i in main}
    for centre in set(own):
        members = [rest[i] for i in range(6) if own[i] == centre]
        rows[3 + rest[centre]] = sum((whole[0, 3 + i] for i in members[1:]), whole[0, 3 + members[0]]) / len(members)
    wanted = torch.stack([*whole[0, :3], *(rows[place] for place in sorted(rows)), *whole[0, 12:]])
    assert_close(few[0], wanted)


def test_words_see_the_image_tokens_of_their_focus() -> None:
    model = llava(layers=1)
    with torch.no_grad(), record(model, stack="language") as calls:
        model(**GIVEN)
    weights, image = calls[0].weights(), GIVEN["input_ids"].eq(IMAGE)
    edited = weights.clone()
    for b in range(2):
        columns = image[b].nonzero()[:, 0].tolist()
        words = [i for i in range(15) if i > columns[-1]]
        for h in range(4):
            for t in words:
                score = {j: sum(float(weights[b, h, t, u] * weights[b, h, u, j]) for u in words) for j in columns}
                for j in sorted(columns, key=lambda j: -score[j])[math.ceil(0.4 * 9) :]:
                    edited[b, h, t, j] = 0
    edited = edited / edited.sum(-1, keepdim=True)
    outputs: list[Tensor] = []
    layer = model.model.language_model.layers[0].self_attn.o_proj
    hook = layer.register_forward_hook(lambda module, args, out: outputs.append(args[0]))
    with torch.no_grad(), clustered(model, 1.0, 0.1, 0.4):
        model(**GIVEN)
    hook.remove()
    wanted = (edited @ calls[0].value.repeat_interleave(2, 1)).transpose(1, 2).flatten(2)
    there = GIVEN["attention_mask"].bool()
    assert_close(outputs[0][there], wanted[there])


def test_neutral_generation_and_what_is_refused() -> None:
    model, own = llava(), method("clustered")
    given = {name: tensor for name, tensor in GIVEN.items() if name != "position_ids"}
    with torch.no_grad():
        wanted = model(**GIVEN).logits
        with own.open(model, Prompt(GIVEN), **own.neutral):
            assert torch.equal(model(**GIVEN).logits, wanted)
        with own.open(model, Prompt(GIVEN), focused=0.5) as thinning:
            assert model.generate(**given, max_new_tokens=3, do_sample=False).shape == (2, 18)
            assert thinning.held_bytes < 0.8 * thinning.full_bytes
        features = model.get_image_features(GIVEN["pixel_values"])
        with clustered(model), pytest.raises(ValueError, match="pixel_values"):
            model(input_ids=GIVEN["input_ids"], mm_encoder_outputs={"image": features})
    for arguments in ({"primary": 2}, {"merged": -1}, {"focused": 0}):
        with pytest.raises(ValueError, match="clustered"), clustered(model, **arguments):
            pass
