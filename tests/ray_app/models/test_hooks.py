"""Hooks see the inputs of modules while the block runs, and never after it."""

import pytest
import torch
from torch import Tensor, nn

from ray_app.models.hooks import read_inputs


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))


def num_hooks(module: nn.Module) -> int:
    return sum(len(part._forward_pre_hooks) for part in module.modules())


def test_each_module_hands_over_its_input_under_its_key() -> None:
    net = model()
    seen: list[tuple[str, Tensor]] = []
    with read_inputs({"in": net[0], "out": net[2]}, lambda key, z: seen.append((key, z))):
        net(torch.ones(4, 3))
    assert [(key, tuple(z.shape)) for key, z in seen] == [("in", (4, 3)), ("out", (4, 5))]
    assert torch.equal(seen[1][1], net[1](net[0](torch.ones(4, 3))))


def test_reading_does_not_change_the_output() -> None:
    net = model()
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    with read_inputs({0: net[0], 2: net[2]}, lambda key, z: None):
        read = net(z)
    assert torch.equal(read, net(z))


def test_hooks_are_detached_after_the_block() -> None:
    net = model()
    seen: list[int] = []
    with read_inputs({0: net[0], 2: net[2]}, lambda key, z: seen.append(key)):
        assert num_hooks(net) == 2
    assert num_hooks(net) == 0
    net(torch.ones(1, 3))
    assert seen == []


def test_hooks_are_detached_after_an_error_in_the_block_or_in_the_reader() -> None:
    net = model()
    with pytest.raises(KeyError, match="block"), read_inputs({0: net[0]}, lambda key, z: None):
        raise KeyError("block")
    assert num_hooks(net) == 0

    def refuse(key: int, z: Tensor) -> None:
        raise ValueError("reader")

    with pytest.raises(ValueError, match="reader"), read_inputs({0: net[0]}, refuse):
        net(torch.ones(1, 3))
    assert num_hooks(net) == 0
