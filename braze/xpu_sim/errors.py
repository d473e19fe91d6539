"""What can go wrong between a Triton kernel and its run on the simulator, in words a kernel author can act on."""


class SimulatorUnavailable(ImportError):
    """A package the simulator needs is not installed; the message says which and how to install it."""


class MissingBuiltin(RuntimeError):
    """The compiled kernel calls a GPU built-in that the simulator does not emulate; the message names it."""


class SurfaceError(RuntimeError):
    """A 2D block message broke a rule of the hardware (alignment, pitch, width); the message says which."""
