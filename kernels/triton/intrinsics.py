"""Instructions that only some devices or versions of Triton have, each with what stands in for it elsewhere.

Programmatic dependent launch lets a kernel start while its predecessor drains: it may touch what the predecessor does not
write, then waits. Where the instructions are missing nothing is launched that way, and the functions are empty.
"""

import triton
import triton.language as tl

HAVE_DEPENDENT_LAUNCH = hasattr(getattr(tl.extra, "cuda", None), "gdc_wait")

if HAVE_DEPENDENT_LAUNCH:

    @triton.jit
    def wait():
        """Until all that the predecessor wrote can be read."""
        tl.extra.cuda.gdc_wait()

    @triton.jit
    def launch_dependents():
        """Lets the successor start where there is room."""
        tl.extra.cuda.gdc_launch_dependents()

    @triton.jit
    def prefetch(pointers):
        """Asks for the cache line of each pointer to be brought into L2."""
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
        )

else:

    @triton.jit
    def wait():
        """Nothing: the predecessor has ended."""

    @triton.jit
    def launch_dependents():
        """Nothing: the successor waits for the end."""

    @triton.jit
    def prefetch(pointers):
        """Nothing."""
