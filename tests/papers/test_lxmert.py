"""LXMERT's layer against the one in transformers, both streams and all weights."""

import pytest
import torch
from transformers.models.lxmert.configuration_lxmert import LxmertConfig
from transformers.models.lxmert.modeling_lxmert import LxmertXLayer

from manyheads.mechanisms.cross.lxmert import Lxmert


def pair():
    """Our two directions, sharing their cross attention, and theirs with the same weights."""
    torch.manual_seed(0)
    config = LxmertConfig(hidden_size=12, num_attention_heads=3, intermediate_size=20, hidden_act="gelu")
    theirs = LxmertXLayer(config).double().eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    text, image = (Lxmert(12, 3, hidden=20).double().eval() for _ in range(2))
    image.cross, image.norm_cross = text.cross, text.norm_cross
    for ours, own, inter, output in (
        (text, theirs.lang_self_att, theirs.lang_inter, theirs.lang_output),
        (image, theirs.visn_self_att, theirs.visn_inter, theirs.visn_output),
    ):
        copy_attention(ours.cross, ours.norm_cross, theirs.visual_attention.att, theirs.visual_attention.output)
        copy_attention(ours.own, ours.norm_own, own.self, own.output)
        for mine, their in ((ours.up, inter.dense), (ours.down, output.dense), (ours.norm_out, output.LayerNorm)):
            mine.load_state_dict(their.state_dict())
    return text, image, theirs


def copy_attention(heads, norm, attention, output):
    for mine, their in zip(
        (heads.q_proj, heads.k_proj, heads.v_proj, heads.o_proj, norm),
        (attention.query, attention.key, attention.value, output.dense, output.LayerNorm),
        strict=True,
    ):
        mine.load_state_dict(their.state_dict())


@torch.no_grad()
def test_both_streams_equal_transformers():
    text, image, theirs = pair()
    words, objects = torch.randn(2, 5, 12).double(), torch.randn(2, 4, 12).double()
    wanted_words, wanted_objects, weights = theirs(words, None, objects, None, output_attentions=True)
    found = text(words, objects, need_weights=True)
    torch.testing.assert_close(found.output, wanted_words)
    torch.testing.assert_close(found.weights, weights)
    torch.testing.assert_close(image(objects, words).output, wanted_objects)


@torch.no_grad()
def test_one_word_and_one_object_by_hand():
    """Both softmaxes are over one token: values pass through, twice normed, then the feed-forward layer."""
    text, _, _ = pair()
    word, thing = torch.randn(12).double(), torch.randn(12).double()

    def norm(layer, row):
        return (row - row.mean()) / row.var(correction=0).sqrt() * layer.weight + layer.bias

    h = norm(text.norm_cross, word + text.cross.o_proj(text.cross.v_proj(thing)))
    s = norm(text.norm_own, h + text.own.o_proj(text.own.v_proj(h)))
    up = text.up(s)
    wanted = norm(text.norm_out, s + text.down(up * (1 + torch.erf(up / 2**0.5)) / 2))
    torch.testing.assert_close(text(word[None, None], thing[None, None]).output[0, 0], wanted)


def test_refusals():
    with pytest.raises(ValueError, match="hidden=0"):
        Lxmert(12, 3, hidden=0)
