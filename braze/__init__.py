"""braze: a torch.compile backend that finds MoE and RoPE by what they compute and lowers them to fused kernels."""

from braze import ops as ops
from braze.backend import RequirementError, collect
from braze.explain import Report, explain
from braze.fuse import fuse
from braze.package import package

__all__ = ["Report", "RequirementError", "collect", "explain", "fuse", "package"]
