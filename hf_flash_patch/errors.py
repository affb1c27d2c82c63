"""The errors of this package. Each text says what was given, what is allowed, and what to do."""


class UnsupportedModelError(ValueError):
    """A model, or a part of it, cannot be served exactly."""


class UnsupportedKernelError(ValueError):
    """Inputs that no attention engine takes, or that the requested backend cannot serve."""


class MaskError(ValueError):
    """A mask argument is malformed, or contradicts another argument."""


class ContextExtensionError(ValueError):
    """A model's maximum context cannot be extended as asked."""


class ParallelError(ValueError):
    """A sequence cannot be shared among processes as asked."""
