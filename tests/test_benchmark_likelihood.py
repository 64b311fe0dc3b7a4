"""The likelihood benchmark has the keys it promises, and asks each network as often as it says."""

from __future__ import annotations

import argparse

import pytest
import torch

from benchmarks import likelihood
from benchmarks.peers.likelihood import network_and_data, over_forward

KEYS = ("ours/exact", "ours/hutchinson", "ours/exact_compiled")


def test_keys_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)
    found = dict(likelihood.measure(argparse.Namespace(peers=None, pairs=2, steps=2, tiny=True)))
    assert tuple(found) == KEYS
    assert all(0 < ratio.lower <= ratio.median <= ratio.upper for ratio in found.values())


def test_a_solve_is_shared_between_its_calls() -> None:
    """A solve that is nothing but forwards costs one forward a call."""
    net, x = network_and_data(16, (64, 64))
    t = torch.full((len(x),), 0.5)

    @torch.inference_mode()
    def solve() -> None:
        for _ in range(50):
            net(x, t)

    assert over_forward(net, x, solve, 9).median == pytest.approx(1, abs=0.3)
