"""One family of exceptions: whoever catches `GazeError` catches everything gazepatch raises on purpose."""


class GazeError(Exception):
    """Base of every error raised by gazepatch. The message says what was expected, what came and what to do."""


class ConfigError(GazeError, ValueError):
    """A setting has the wrong type or value, or a configuration holds an unknown key."""


class UnsupportedModelError(GazeError):
    """The architecture has no adapter, or no layer of it can gaze."""


class PatchError(GazeError, RuntimeError):
    """The model is patched already, is not patched, or was changed while it was patched."""


class CacheError(GazeError, RuntimeError):
    """A key-value cache cannot be used here: of another model, of another patch, or of a kind that cannot gaze."""


class ArtefactError(GazeError):
    """A folder or file is not a gazepatch artefact that fits the model."""


class TrainingError(GazeError):
    """A training cannot start or go on: its data are broken, a package is missing, or it does not fit its folder."""


class HubError(GazeError):
    """The Hub cannot be reached, refuses, or does not have what was asked for."""
