"""braze: a torch.compile backend that finds MoE and RoPE by what they compute and lowers them to fused kernels."""

from braze import ops as ops
