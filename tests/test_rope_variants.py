"""Every way in which models of transformers spell a rotation, by their own functions: found, named, numerically the same.

One entry a spelling; its name says what is special about it. Angles are random, so that a table read wrongly shows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="needs the extra 'hf' (pip install 'braze[hf]')")

from tests.harness import Fused, assert_close

B, HEADS, KV, S, D = 2, 4, 2, 7, 16


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of(model: str, function: str) -> Any:
    return getattr(import_module(f"transformers.models.{model}.modeling_{model}"), function)


def q_and_k(size: int = D) -> tuple[Tensor, Tensor]:
    """[B, H, S, size], the projections' memory behind them."""
    return normal(B, S, HEADS, size).transpose(1, 2), normal(B, S, KV, size, seed=1).transpose(1, 2)


def angles(*shape: int) -> Tensor:
    return normal(*shape, seed=2)


def doubled(a: Tensor) -> Tensor:
    return torch.cat((a, a), -1)


def spaced(a: Tensor) -> Tensor:
    return a.repeat_interleave(2, -1)


Function = Callable[..., Any]
Maker = Callable[[], Function]  # imports the model's code, outside what is compiled


def of_tables(model: str, function: str = "apply_rotary_pos_emb", widen: Callable[[Tensor], Tensor] = doubled) -> Maker:
    """function(q, k, cos, sin) with tables made of angles."""

    def make() -> Function:
        turn = of(model, function)
        return lambda q, k, a: turn(q, k, widen(a).cos(), widen(a).sin())

    return make


def each(maker: Maker) -> Maker:
    """For functions of one tensor."""

    def make() -> Function:
        turn = maker()
        return lambda q, k, *rest: (turn(q, *rest), turn(k, *rest))

    return make


def single(model: str, function: str, widen: Callable[[Tensor], Tensor] = doubled) -> Maker:
    """function(x, cos, sin), for q and for k."""

    def make() -> Function:
        turn = of(model, function)
        return lambda x, a: turn(x, widen(a).cos(), widen(a).sin())

    return each(make)


def polar(model: str, function: str) -> Maker:
    def make() -> Function:
        turn = of(model, function)
        return lambda q, k, a: turn(q, k, torch.polar(torch.ones_like(a), a))

    return make


def tokens_first(maker: Maker) -> Maker:
    """For functions on [B, S, H, D]."""

    def make() -> Function:
        turn = maker()
        return lambda q, k, *rest: turn(q.transpose(1, 2), k.transpose(1, 2), *rest)

    return make


def sines() -> Function:
    """GPT-J's takes half-width tables, sines first."""
    turn = of("gptj", "apply_rotary_pos_emb")
    return lambda x, a: turn(x, a.sin(), a.cos())


def conformer() -> Function:
    turn = of("seamless_m4t", "SeamlessM4TConformerSelfAttention")._apply_rotary_embedding
    attention = SimpleNamespace(num_heads=HEADS, head_size=D)
    return lambda x, a: turn(attention, x, torch.stack((doubled(a).cos(), doubled(a).sin()))[:, :, None, None, :])


def gathered() -> Function:
    turn = of("clvp", "apply_rotary_pos_emb")
    return lambda q, k, v, a, positions: turn(q, k, v, doubled(a).cos(), doubled(a).sin(), positions)


def axial() -> Function:
    attention = SimpleNamespace(d_dim=4, h_dim=4, w_dim=4, attention_head_size=D)
    turn = of("vjepa2", "VJEPA2RopeAttention").apply_rotary_embeddings
    return lambda x, *positions: turn(attention, x, [p.to(x.dtype) for p in positions])


def per_axis() -> Function:
    """Gemma 4's vision tower: the head is split in two, one half for each axis of the picture."""
    turn = of("gemma4", "apply_multidimensional_rope")

    def run(x: Tensor, a: Tensor, positions: Tensor) -> Any:
        a = torch.cat((doubled(a[..., :4]), doubled(a[..., 4:])), -1)
        return turn(x, a.cos(), a.sin(), positions)

    return run


def roformer() -> Function:
    turn = of("roformer", "RoFormerSelfAttention").apply_rotary_position_embeddings
    return lambda q, k, a: turn(torch.cat((a.sin(), a.cos()), -1), q, k)


def split_form(model: str) -> Maker:
    """function(x, cos, sin) with tables of half the width."""
    return single(model, "_apply_rotary_emb", lambda a: a)


@dataclass(frozen=True)
class Spelling:
    """maker()(*inputs) rotates; forms: of its sites, sorted, without repetitions; sites: how many there are."""

    maker: Maker
    inputs: tuple[Tensor, ...]
    forms: tuple[str, ...]
    sites: int = 2
    dtype: torch.dtype = torch.float32


def usual(width: int = D // 2, size: int = D) -> tuple[Tensor, ...]:
    return *q_and_k(size), angles(1, S, width)


def packed(width: int = D // 2) -> tuple[Tensor, ...]:
    """[T, H, D], as vision towers have it."""
    return normal(S, HEADS, D), normal(S, KV, D, seed=1), angles(S, width)


IN, HALF = ("interleaved",), ("half",)
SPELLINGS = {
    "full neox half": Spelling(of_tables("llama"), usual(), HALF),
    "2D vision rope applied fp32 upcast, half": Spelling(
        of_tables("qwen2_vl", "apply_rotary_pos_emb_vision"), packed(), HALF, dtype=torch.bfloat16
    ),
    "partial neox half": Spelling(of_tables("phi3"), usual(4), ("half, partial 8 of 16",)),
    "deepseek interleave-in, half-out (::2 / 1::2 -> cat), cos/sin first half": Spelling(
        of_tables("deepseek_v3", "apply_rotary_pos_emb_interleave"), usual(), ("interleaved to half",)
    ),
    "full neox half (output cast back, cos/sin fp32)": Spelling(
        of_tables("olmo2"), usual(), HALF, dtype=torch.bfloat16
    ),
    "full interleaved fp32 upcast": Spelling(
        of_tables("cohere", widen=spaced), usual(), IN, dtype=torch.bfloat16
    ),
    "2D axial vision, interleaved pairs (SAM family), fp32": Spelling(
        of_tables("sam2_video", "apply_rotary_pos_emb_2d", spaced), (*q_and_k(), angles(S, D // 2)), IN
    ),
    "full neox half fp32 upcast": Spelling(of_tables("esm"), usual(), HALF, dtype=torch.bfloat16),
    "full neox half (single tensor)": Spelling(single("gemma3n", "apply_rotary_pos_emb"), usual(), HALF),
    "partial interleaved + cos/sin[:half].repeat_interleave(2)": Spelling(
        of_tables("glm"), usual(4), ("interleaved, partial 8 of 16",)
    ),
    "complex view_as_complex/view_as_real (fp32)": Spelling(
        tokens_first(polar("llama4", "apply_rotary_emb")), usual(), IN
    ),
    "complex, heads before tokens": Spelling(polar("deepseek_v2", "apply_rotary_emb"), usual(), IN),
    "2D ViT, half, prefix tokens passed through": Spelling(
        of_tables("dinov3_vit"), (*q_and_k(), angles(S - 2, D // 2)), HALF
    ),
    "2x2 rotation-matrix product (reshape ..,1,2; mul; sum)": Spelling(
        of_tables("pe_audio"), usual(), IN
    ),
    "conformer half with [T,B,..] transpose": Spelling(
        each(conformer), (normal(B, S, HEADS * D), normal(B, S, HEADS * D, seed=1), angles(S, D // 2)), HALF
    ),
    "GPT-J: repeat_interleave(sin,2) + rotate_every_two": Spelling(
        tokens_first(each(sines)), usual(), IN
    ),
    "full interleaved + cos/sin[:half].repeat_interleave(2) fp32 upcast": Spelling(
        of_tables("ernie4_5"), usual(), IN, dtype=torch.bfloat16
    ),
    "partial interleaved": Spelling(of_tables("glm4v", widen=spaced), usual(4), ("interleaved, partial 8 of 16",)),
    "gpt-oss wrapper": Spelling(of_tables("gpt_oss", widen=lambda a: a), usual(), HALF),
    "3D axial (vjepa2) inline rotate": Spelling(
        each(axial), (*q_and_k(), *(torch.arange(S) // n % m for n, m in ((4, 2), (2, 2), (1, 2)))), IN, sites=6
    ),
    "full interleaved": Spelling(of_tables("blt", widen=spaced), usual(), IN),
    "full neox half + v rotated, cos[position_ids] gather": Spelling(
        gathered,
        (*q_and_k(), normal(B, HEADS, S, D, seed=3), angles(12, D // 2), torch.arange(S).flip(0)[None]), HALF, sites=3,
    ),
    "deepseek_v4 trailing partial, interleaved, fp32": Spelling(
        single("deepseek_v4", "apply_rotary_pos_emb", lambda a: a), usual(4), ("interleaved, partial [8:16] of 16",),
        dtype=torch.bfloat16,
    ),
    "multi-dim split per axis, half each": Spelling(
        tokens_first(each(per_axis)), (*q_and_k(), angles(1, S, 8), torch.zeros(1, S, 2)), HALF, sites=4
    ),
    "gpt-oss split form: chunk2; a*c-b*s ; b*c+a*s ; cat": Spelling(
        split_form("gpt_oss"), usual(), HALF
    ),
    "full interleaved + cos/sin[:half].repeat_interleave(2)": Spelling(of_tables("helium"), usual(), IN),
    "2D vision rope applied fp32 upcast, interleaved": Spelling(
        of_tables("inkling2", "apply_rotary_pos_emb_vision", spaced), packed(), IN, dtype=torch.bfloat16
    ),
    "2D vision rope applied fp32 upcast, partial half": Spelling(
        of_tables("minimax_m3_vl", "apply_rotary_pos_emb_vision"), packed(4), ("half, partial 8 of 16",)
    ),
    "fp64 partial interleaved (musicflamingo time)": Spelling(
        single("musicflamingo", "apply_rotary_time_emb", spaced), usual(4), ("interleaved, partial 8 of 16",)
    ),
    "full half, sign-swapped (nanochat)": Spelling(of_tables("nanochat"), usual(), ("half, opposite angle",)),
    "gpt-oss-like split form, interleaved ::2 -> stack.flatten": Spelling(
        split_form("openai_privacy_filter"), usual(), IN
    ),
    "roformer interleaved stack/reshape_as": Spelling(roformer, usual(), IN),
}  # fmt: skip


def tensors(result: Any) -> list[Tensor]:
    return [t for part in result for t in tensors(part)] if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_transformers(name: str) -> None:
    case = SPELLINGS[name]
    inputs = [t.to(case.dtype) if t.is_floating_point() and n < 2 else t for n, t in enumerate(case.inputs)]
    run = case.maker()
    fused = Fused(run)
    got = tensors(fused(*inputs))
    assert fused.count("rope") == [case.sites], fused.reasons
    assert sorted({f.form for f in fused.findings}) == list(case.forms)
    assert fused.reasons == []
    exact = tensors(run(*(t.double() if t.is_floating_point() else t for t in inputs)))
    for a, b in zip(got, exact, strict=True):
        assert_close(a, b.double(), 8e-3 if case.dtype == torch.bfloat16 else 2e-6)
