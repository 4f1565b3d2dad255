"""project_splice: project image features and put them, with the text embeddings, at their places in the sequence."""

import torch
import torch.nn.functional as F
from torch import Tensor


def project_splice(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    embedding: Tensor,
    input_ids: Tensor,
    image_rows: Tensor,
    text_rows: Tensor,
) -> Tensor:
    """The decoder's input: ``H_v = W Z_v`` (Visual Instruction Tuning, equation 1) among the text embeddings.

    Args:
        features: (..., C) image features Z_v; flattened to (P, C) in order.
        weight: (D, C) projection W.
        bias: (D,) or None.
        embedding: (V, D) token embedding table.
        input_ids: (T,) int64 token ids; what stands at image rows is never looked up.
        image_rows: (P,) integer, where row p of the projected features goes.
        text_rows: (T-P,) integer, all other positions.

    Returns:
        (T, D), every row written exactly once.
    """
    image = F.linear(features.reshape(-1, features.shape[-1]), weight, bias)  # (P, D)
    text = F.embedding(input_ids[text_rows], embedding)  # (T-P, D)
    both = torch.cat((image.to(text.dtype), text))
    return both.new_empty(both.shape).index_copy(0, torch.cat((image_rows, text_rows)).long(), both)
