"""Packing puts several rows into one sequence; it is only right when no row sees another."""

from __future__ import annotations

from typing import Any

import torch

from finetune_trainer.failures import BadConfig

SAMPLE_TOKENS = 32  # per row; enough to see a leak, and a forward pass of nothing
TOLERANCE = (
    0.05  # of the logits' spread; separate rows differ by rounding only, a leak changes them altogether
)


def check_separation(model: Any, rows: list[list[int]]) -> None:
    """Compares a row alone with the same row behind another one. Raises BadConfig when the model lets them mix.

    Restarting position_ids are what tells rows apart. Attention masks follow them in most models; architectures with
    a recurrent state, and attention kernels that ignore the mask, do not.
    """
    first = rows[0][:SAMPLE_TOKENS]
    second = rows[-1][:SAMPLE_TOKENS]
    device = model.get_input_embeddings().weight.device
    packed = torch.tensor([first + second], device=device)
    positions = torch.tensor([[*range(len(first)), *range(len(second))]], device=device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        together = (
            model(input_ids=packed, position_ids=positions, use_cache=False).logits[0, len(first) :].float()
        )
        alone = model(input_ids=packed[:, len(first) :], use_cache=False).logits[0].float()
    model.train(was_training)
    difference = (together - alone).abs().max().item()
    if difference > TOLERANCE * max(alone.std().item(), 1e-6):
        raise BadConfig(
            f"hyperparameters.packing: {type(model).__name__} lets packed rows see one another "
            f"(logits differ by {difference:.3g}); set packing to false"
        )
