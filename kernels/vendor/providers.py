"""Which vendors' ops are loaded: what `braze doctor` lists, and a part of the caches' keys, as it decides what is made."""

from braze.kernels.vendor import detect, ipex, sgl_kernel, vllm_xpu

OPS = (
    sgl_kernel.GROUPED_MM, sgl_kernel.TOPK_SOFTMAX, sgl_kernel.TOPK_SIGMOID, sgl_kernel.FUSED_GATE, sgl_kernel.ROTARY,
    vllm_xpu.GROUPED_MM, vllm_xpu.TOPK_SOFTMAX, vllm_xpu.TOPK_SIGMOID, vllm_xpu.GROUPED_TOPK, vllm_xpu.ROTARY,
    ipex.ROTATE_HALF, ipex.ROTATE_TWO, ipex.TOPK_SOFTMAX,
)  # fmt: skip


def present() -> tuple[tuple[str, str], ...]:
    """(op, "found", or why there is none that can be used) for each op that a provider is made of."""
    found = ((op, detect.find(op)) for op in OPS)
    return tuple((op.full_name, f if isinstance(f, str) else f"found, schema {f.form + 1}") for op, f in found)
