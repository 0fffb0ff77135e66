"""Every error that the plugin raises on purpose.

Each message says what was expected, what came, and what to do about it::

    Dsv32Error
    ├── UnsupportedVllmError   this vLLM is outside the tested range
    ├── ConfigError            a vLLM setting or a model configuration that the plugin does not serve
    ├── CheckpointError        a tensor is missing, unexpected or misshapen
    ├── KernelUnavailableError no implementation of an operation takes the problem
    └── MessageError           a chat history that has no DeepSeek-V3.2 prompt (HTTP 400)
"""

__all__ = [
    "CheckpointError",
    "ConfigError",
    "Dsv32Error",
    "KernelUnavailableError",
    "MessageError",
    "UnsupportedVllmError",
]


class Dsv32Error(Exception):
    """Base of all errors of this package."""


class UnsupportedVllmError(Dsv32Error, RuntimeError):
    """The installed vLLM is outside the range that the plugin was tested with."""


class ConfigError(Dsv32Error, ValueError):
    """A setting of vLLM, or of the model's configuration, that the plugin does not serve."""


class CheckpointError(Dsv32Error, ValueError):
    """A tensor of the checkpoint is missing, unexpected or misshapen."""


class KernelUnavailableError(Dsv32Error, RuntimeError):
    """No implementation of an operation takes the problem; the message lists each one's reason."""


class MessageError(Dsv32Error, ValueError):
    """A chat history that cannot be rendered; the message names the index of the culprit."""
