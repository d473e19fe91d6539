"""The semantic ops' signatures, in PyTorch's schema language: what they take, in the order and with the defaults of
`braze.kernels.spec`. Importing this module defines them; `braze.ops` gives them kernels.
"""

import torch

MOE_SCHEMA = (
    "(Tensor x, Tensor ids, Tensor weights, Tensor w1, Tensor w2, Tensor? b1=None, Tensor? b2=None, *, "
    'str activation="g*u*sigmoid(g)", str layout="halves", bool transposed=False, str weight_on="output", '
    "float scale=1.0, ScalarType? out_dtype=None) -> Tensor"
)
SEPARATE_SCHEMA = (
    "(Tensor x, Tensor ids, Tensor weights, Tensor[] w1, Tensor[] w2, Tensor[] b1, Tensor[] b2, *, "
    'str activation="g*u*sigmoid(g)", str layout="halves", bool transposed=False, str weight_on="output", '
    "float scale=1.0, ScalarType? out_dtype=None) -> Tensor"
)
APART_SCHEMA = (
    "(Tensor x, Tensor ids, Tensor weights, Tensor gate, Tensor up, Tensor w2, Tensor? b_gate=None, Tensor? b_up=None, "
    'Tensor? b2=None, *, str activation="g*u*sigmoid(g)", str layout="halves", bool transposed=False, '
    'str weight_on="output", float scale=1.0, ScalarType? out_dtype=None) -> Tensor'
)
MLP_SCHEMA = (
    '(Tensor x, Tensor[] w1, Tensor w2, Tensor[] b1, Tensor? b2=None, *, str activation="g*u*sigmoid(g)", str layout="halves", '
    "bool transposed=False, ScalarType? out_dtype=None) -> Tensor"
)
ROPE_SCHEMA = (
    "(Tensor x, Tensor cos, Tensor sin, *, int rotary_dim, int start=0, str layout_in='half', "
    "str layout_out='half', bool inverse=False, ScalarType? out_dtype=None) -> Tensor"
)
ROPE_INTO_SCHEMA = (
    "(Tensor(a!) q_out, Tensor(b!)? k_out, Tensor q, Tensor? k, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight, "
    "Tensor? index, SymInt[] rows, *, int rotary_dim, int start=0, str layout_in='half', str layout_out='half', "
    "bool inverse=False, ScalarType? out_dtype=None, float? eps=None, bool add_one=False) -> ()"
)
NORM_SCHEMA = "(Tensor x, Tensor? weight=None, *, float eps, bool add_one=False, ScalarType? out_dtype=None) -> Tensor"
ROUTE_SCHEMA = (
    "(Tensor logits, Tensor? bias=None, *, int top_k, str scoring='softmax', str select_on='logits', int groups=1, "
    "int top_groups=1, str group_score='max', str closed='out', str renorm='no', float eps=0.0, float scale=1.0, "
    "int shared=0, ScalarType? out_dtype=None, ScalarType ids_dtype=long) -> (Tensor weights, Tensor ids)"
)
GATE_SCHEMA = (
    "(Tensor(a!) weights, Tensor(b!) ids, Tensor x, Tensor w, Tensor? b, Tensor? bias, *, ScalarType logits, "
    + ROUTE_SCHEMA[ROUTE_SCHEMA.index("int top_k") : ROUTE_SCHEMA.index(" ->")]
    + " -> ()"
)
_TAGS = (torch.Tag.pt2_compliant_tag,)

torch.library.define("braze::moe", MOE_SCHEMA, tags=_TAGS)
torch.library.define("braze::moe_separate", SEPARATE_SCHEMA, tags=_TAGS)
torch.library.define("braze::moe_apart", APART_SCHEMA, tags=_TAGS)
torch.library.define("braze::mlp", MLP_SCHEMA, tags=_TAGS)
torch.library.define("braze::rope", ROPE_SCHEMA, tags=_TAGS)
torch.library.define("braze::rms_norm", NORM_SCHEMA, tags=_TAGS)
torch.library.define("braze::rope_into", ROPE_INTO_SCHEMA, tags=_TAGS)
torch.library.define("braze::route", ROUTE_SCHEMA, tags=_TAGS)
torch.library.define("braze::gate_into", GATE_SCHEMA, tags=_TAGS)
torch.library.define("braze::grouped_mm", "(Tensor x, Tensor w, Tensor offs) -> Tensor", tags=_TAGS)
torch.library.define(
    "braze::vendor_grouped_mm",
    "(Tensor x, Tensor w, Tensor counts, Tensor? bias=None, *, str provider, str activation='') -> Tensor",
    tags=_TAGS,
)
torch.library.define(
    "braze::vendor_topk",
    "(Tensor logits, Tensor? bias, int top_k, bool renorm, *, str provider, str scoring='softmax', int groups=1, "
    "int top_groups=1) -> (Tensor weights, Tensor ids)",
    tags=_TAGS,
)
torch.library.define(
    "braze::vendor_rope", "(Tensor x, Tensor cos, Tensor sin, bool interleaved, *, str provider) -> Tensor", tags=_TAGS
)
