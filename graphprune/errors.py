"""Every error that graphprune raises on purpose.

GraphPruneError
├── CaptureError        the model could not be captured as a graph
├── RecipeError         a pass, an option or a recipe is not valid
│   └── OptionError     a keyword argument that does not exist; a TypeError too
├── PassError           a pass crashed; the cause is kept, the passes already run are named
├── VerificationError   a rewrite did not do what it claims: an internal error, never the user's
├── UnsupportedError    an operator, pattern or axis that we decline to touch, with the reason
├── TrainingError       training data do not fit, or training diverged
├── ExportError         ONNX export or its parity check failed, or the folder cannot be written
└── ArtifactError       an artifact is missing, corrupt, tampered with, or not written by graphprune

A message states the fact, the place and the way out, in that order.
"""


def first_line(error: BaseException) -> str:
    """The first line of an error that has text, for libraries append pages; else its class."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


class GraphPruneError(Exception):
    """Base class: catch it to catch everything that graphprune raises on purpose."""


class CaptureError(GraphPruneError):
    """The model could not be captured as a graph."""


class RecipeError(GraphPruneError):
    """A pass name, an option or a recipe is not valid."""


class OptionError(RecipeError, TypeError):
    """A pass or a function was given a keyword argument that it does not have."""


class PassError(GraphPruneError):
    """A pass crashed; `__cause__` holds the original exception."""


class VerificationError(GraphPruneError):
    """A rewrite did not compute what it claims to compute."""


class UnsupportedError(GraphPruneError):
    """An operator, a pattern or an axis that graphprune declines to touch."""


class TrainingError(GraphPruneError):
    """The data, the loss or a checkpoint do not fit the model; or the loss is no number any more.

    Attributes:
        program: the last good weights, where training had begun; else None.
    """

    def __init__(self, message: str, program: object = None) -> None:
        super().__init__(message)
        self.program = program


class ExportError(GraphPruneError):
    """Export failed, or the exported model does not agree with the program."""


class ArtifactError(GraphPruneError):
    """An artifact is missing, corrupt, tampered with, or not written by graphprune."""
