"""The errors a user can meet. Each message names the thing that is wrong, where it is, and what would be right."""


class Emu2Error(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(Emu2Error):
    """A configuration that cannot be run. The message is one line and names the key."""


class DataError(Emu2Error):
    """A sample, shard or tokenizer that cannot be read. A bad sample is skipped and counted, never fatal by itself."""


class NotWanted(DataError):
    """A sample that is sound, and not what is trained on. Skipped and counted, and no share of the bad ones."""


class FeaturesError(Emu2Error):
    """Precomputed features that are sound and another run's. Which rank meets them depends on the data."""


class CheckpointError(Emu2Error):
    """A checkpoint that cannot be written or read."""


class ConversionError(Emu2Error):
    """Weights that do not fit the model they are meant for."""


class PeerLost(Emu2Error):
    """Another rank ended, or cannot be reached."""


class TrainingDiverged(Emu2Error):
    """Too many updates in a row could not be applied. All ranks raise it together, with the same message."""


class Stopped(Emu2Error):
    """The run was asked to end before its last step, and has saved. All ranks raise it together."""

    def __init__(self, message: str, code: int) -> None:
        """`code` is what the process ends with; never 0, so that nobody takes the run for finished."""
        super().__init__(message)
        self.code = code
