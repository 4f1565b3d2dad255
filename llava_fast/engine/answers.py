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
    sampling, stream = sequence.sampling, sequence.text
    answered = sequence.known - sequence.asked
    text, stopped, reason = "", False, None
    if token in sequence.stop_ids and answered > sampling.min_tokens:
        reason = "stop"
    else:
        if stream.watches:
            text, stopped = stream.push(token, may_stop=answered >= sampling.min_tokens)
        if stopped:
            reason = "stop"
        elif answered == sequence.limit:
            reason = "length"
    if reason and stream.watches and not stopped:
        text += stream.finish()
    score = None
    if logprobs is not None and sampling.logprobs is not None:
        score = logprobs.of_token(row, token, sampling.logprobs)
    sequence.job.handle._publish(sequence.index, token, reason, text, score)
    return reason


def keep_prompt_logprobs(sequence: Sequence, places: list[int], logprobs: Logprobs) -> None:
    """Note the log-probabilities of the prompt tokens at ``places``."""
    found = sequence.job.handle._completion.prompt_logprobs
    assert found is not None
    for row, place in enumerate(places):
        found[place] = logprobs.of_token(row, int(sequence.ids[place]), sequence.sampling.prompt_logprobs or 0)
    sequence.scored = max(sequence.scored, sequence.computed)
