"""Traces of memory against sums worked by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genalign.training.memory_estimate import FusedAttention, checkpointed_blocks, largest_layer, saved_activations


class Blocks(nn.Module):
    """Two blocks of x -> x + tanh(W x), with the flag of diffusers."""

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh()) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def test_every_saved_tensor_counts_once_and_weights_do_not() -> None:
    real, meta = Blocks(), Blocks().to("meta")
    one = 4 * 8 * 4
    for network, device in ((real, "cpu"), (meta, "meta")):
        x = torch.zeros(4, 8, device=device)
        # each block saves its input (of the linear layer) and tanh's output
        assert saved_activations(network, lambda network=network, x=x: network(x), False) == 4 * one
    # checkpointed, the two inputs, and within the largest block its own tanh; the input is saved only once
    assert saved_activations(meta, lambda: meta(x), True) == 2 * one + 2 * one
    assert list(checkpointed_blocks(meta)) == list(meta.blocks)


def test_attention_saves_nothing_quadratic() -> None:
    query = torch.empty(2, 3, 1000, 4, device="meta", requires_grad=True)
    key, value = torch.empty(2, 2, 3, 500, 4, device="meta")

    def attend() -> Tensor:
        return F.scaled_dot_product_attention(query, key=key, value=value)

    saved = saved_activations(nn.Identity(), attend, False)
    assert saved == 4 * 2 * 3 * 4 * (1000 + 2 * 500 + 1000)  # key and value are halves of one storage
    with FusedAttention():
        assert attend().shape == (2, 3, 1000, 4)


def test_the_largest_layer_has_the_most_input_and_output() -> None:
    network = nn.Sequential(nn.Linear(2, 100), nn.Linear(100, 3)).to("meta")
    assert largest_layer(network, lambda: network(torch.empty(5, 2, device="meta"))) == 4 * 5 * 103
