"""Derivation of a schema: a family's own class, built tiny and watched, shows the roles of its tensors.

Nothing here is proof: a draft is believed only after `growth.rehearse` has grown a tiny model by it and found
the same logits.

A worked example, Starcoder 2. Its config is shrunk to a tiny twin (`shrink`): hidden size 64, 4 query heads
and 2 key-value heads, feed-forward size 88, vocabulary 101. Its class is built again and again on the meta
device with one size changed (`axes`), and run once under watch (`watch`), which shows the axes that are
summed over (in brackets):

    tensor                     twin         width ×2    queries ×2  kv heads ×2  ffn + 8   axes
    embed_tokens.weight        101, [64]    101, 128    101, 64     101, 64      101, 64   vocab, residual
    self_attn.q_proj.weight    64, [64]     128, 128    64, 64      64, 64       64, 64    (kv group qk), residual
    self_attn.k_proj.weight    32, [64]     64, 128     16, 64      64, 64       32, 64    (kv qk*), residual
    self_attn.o_proj.weight    64, [64]     128, 128    64, 64      64, 64       64, 64    residual, (kv group v)
    mlp.c_fc.weight            88, [64]     88, 128     88, 64      88, 64       96, 64    ffn, residual
    mlp.c_proj.weight          64, [88]     128, 88     64, 88      64, 88       64, 96    residual, ffn
    norm.weight                64           128         64          64           64        residual

The width takes the heads with it, since `q_proj` keeps its length when there are more of them: a head's dim
is hidden size / heads. The vocabulary moves the first axis of the embedding in the same way as the
feed-forward size moves `c_fc`. What no size tells, the class's own names of the projections do: `q_proj` and
`o_proj` run over heads (`roles`). What nothing tells is a choice, to be tried in turn (`roles.Choices`). The
last module behaves as a norm that removes the mean, and the output head reads it. So the lines are
(`schema`):

    model.embed_tokens  vocab -> residual
    model.layers.*.self_attn.q_proj  (kv group qk) <- residual + bias
    model.layers.*.self_attn.k_proj  (kv qk*) <- residual + bias
    model.layers.*.self_attn.o_proj  residual <- (kv group v) + bias
    model.layers.*.mlp.c_fc  ffn <- residual + bias
    model.layers.*.mlp.c_proj  residual <- ffn + bias
    model.norm  final norm residual + bias
"""

from __future__ import annotations

from outgrow.model.derive.axes import Keys
from outgrow.model.derive.derivation import (
    LENGTH,
    ROWS,
    check_size,
    derive,
    library_knows,
    random_tokens,
    tiny_configs,
    whole_config,
)
from outgrow.model.derive.pictures import Inputs, with_picture
from outgrow.model.derive.probe import build, named_shapes, passed_over, scramble, shapes, stored, tied_names
from outgrow.model.derive.roles import Draft
from outgrow.model.derive.schema import drafted_family, variants
from outgrow.model.derive.shrink import place_tokens
from outgrow.model.derive.unfit import Unfit
from outgrow.model.derive.watch import Uses, uses

__all__ = [
    "LENGTH",
    "ROWS",
    "Draft",
    "Inputs",
    "Keys",
    "Unfit",
    "Uses",
    "build",
    "check_size",
    "derive",
    "drafted_family",
    "library_knows",
    "named_shapes",
    "passed_over",
    "place_tokens",
    "random_tokens",
    "scramble",
    "shapes",
    "stored",
    "tied_names",
    "tiny_configs",
    "uses",
    "variants",
    "whole_config",
    "with_picture",
]
