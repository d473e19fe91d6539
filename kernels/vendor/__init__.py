"""Kernels that Intel's projects ship as PyTorch ops: found by schema, used where they are asked for or known to be faster."""
