"""From drawn tokens to what readers get: text, log-probabilities, and where an answer ends."""

from __future__ import annotations

from llava_fast.engine.sampler import Logprobs
from llava_fast.engine.sequence import Sequence


def deliver(sequence: Sequence, token: int, logprobs: Logprobs | None, row: int) -> str | None:
    """Hand a new token to the reader.

    Args:
        sequence: ``token`` is its last.
        token: an id.
        logprobs: of the step's tokens, where any sequence wanted them; ``row`` is this one's.

    Returns:
        Why the answer ends here, "stop" or "length"; None where it goes on.
    """
    answered = sequence.known - sequence.asked
    reason: str | None = None
    if token in sequence.stop_ids and answered > sequence.sampling.min_tokens:
        reason = "stop"
    elif answered == sequence.limit:
        reason = "length"
    handle = sequence.job.handle
    if sequence.simple and not sequence.text.watches:
        handle._publish(sequence.index, token, reason)
        return reason
    text, reason = _spell(sequence, token, answered, reason)
    score = None
    if logprobs is not None and sequence.sampling.logprobs is not None:
        score = logprobs.of_token(row, token, sequence.sampling.logprobs)
    handle._publish(sequence.index, token, reason, text, score)
    return reason


def _spell(sequence: Sequence, token: int, answered: int, reason: str | None) -> tuple[str, str | None]:
    """The text that a token adds where stop texts are watched for, and why the answer ends with it, if it does."""
    stream = sequence.text
    if not stream.watches:
        return "", reason
    text = ""
    if reason != "stop":  # the token that ends an answer is no text
        text, stopped = stream.push(token, may_stop=answered >= sequence.sampling.min_tokens)
        if stopped:
            return text, "stop"
    return (text + stream.finish() if reason else text), reason


def keep_prompt_logprobs(sequence: Sequence, places: list[int], logprobs: Logprobs) -> None:
    """Note the log-probabilities of the prompt tokens at ``places``."""
    found = sequence.job.handle._completion.prompt_logprobs
    assert found is not None
    for row, place in enumerate(places):
        found[place] = logprobs.of_token(row, int(sequence.ids[place]), sequence.sampling.prompt_logprobs or 0)
    sequence.scored = max(sequence.scored, sequence.computed)
