"""Typed errors that users may catch. Every message names the cause, the offending value and the cure."""


class LlavaError(Exception):
    """Base of every error that llava_fast raises on purpose."""


class ConfigError(LlavaError, ValueError):
    """A configuration that cannot work: an unknown name, sizes that do not fit together, an unsupported feature."""


class CheckpointError(LlavaError):
    """Weights that cannot be read: missing, unexpected or mis-shaped tensors, a truncated file, an unknown format."""


class ImageError(LlavaError, ValueError):
    """An image that cannot be used: unreadable, truncated, over the pixel limit, of an unknown kind."""


class TokenizerError(LlavaError):
    """A tokenizer that is missing, cannot be read, or does not fit the model."""


class SampleError(LlavaError, ValueError):
    """A training sample that cannot be used.

    Attributes:
        sample_id: the sample's ``id`` as the data file gives it.
    """

    def __init__(self, sample_id: str, message: str):
        super().__init__(f"sample {sample_id!r}: {message}")
        self.sample_id = sample_id
        self.message = message

    def __reduce__(self):  # crosses process borders: data workers send it to the training process
        return (SampleError, (self.sample_id, self.message))


class TrainingError(LlavaError):
    """A training run that must stop, such as one whose loss is no longer finite."""


class RequestError(LlavaError):
    """A request to the engine that failed. It fails alone: the engine and every other request go on."""


class InvalidRequestError(RequestError, ValueError):
    """A request that cannot be run as it is: malformed messages, a setting outside its range, too many images."""


class PromptTooLongError(InvalidRequestError):
    """The prompt, image rows included, leaves no room for an answer in the context or in the cache."""


class DeadlineError(RequestError, TimeoutError):
    """A request that was not finished within its ``timeout``. What was generated until then has been delivered."""


class CancelledError(RequestError):
    """A request that was cancelled."""


class StepError(RequestError):
    """An exception inside the model while this request was being computed; the exception is its ``__cause__``."""


class QueueFullError(LlavaError):
    """The engine's queue holds ``max_queue`` requests; try again later or raise the bound."""


class EngineClosedError(LlavaError):
    """The engine was closed, or stopped by a fault of its device (then ``engine.failed`` says why)."""
