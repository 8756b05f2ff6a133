"""Routers: what chooses, for each token, the experts of a layer's MLP that are kept.

The three of MoEfication (Zhang et al., 2022, arXiv 2110.01786), and chance: the experts with the
most mass, which only their activations tell; those whose mean unit row is nearest to the unit input
of the MLP; and a network of two layers that reads that input.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, normalize, one_hot

from analysis.routing import ROUTERS, KeptMass, Router

__all__ = ["LayerRouters", "RoutedLayer", "learn_router"]

_BATCH = 512
_EPOCHS = 30
_RATE = 0.01
"""As in the authors' code."""
_HELD_OUT = 10
"""One position in so many tells when learning is best."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerRouters:
    """The experts of one layer, and what chooses among them; on the CPU."""

    labels: Tensor
    """(width,) int64: expert of each neuron."""
    centres: Tensor
    """(experts, width of the residual stream) float32: mean unit rows of each expert."""
    learned: tuple[Tensor, Tensor]
    """(experts, width of the residual stream) and (experts, experts) float32: weights of the
    network."""

    @classmethod
    def untaught(cls, labels: Tensor, centres: Tensor) -> "LayerRouters":
        """Routers whose network is as it is before it learns: centres and identity."""
        return cls(labels=labels, centres=centres, learned=(centres, torch.eye(len(centres))))

    def taught(self, x: Tensor, masses: Tensor, *, seed: int) -> "LayerRouters":
        """The same with a network that has learned; arguments as `learn_router`."""
        return replace(self, learned=learn_router(x, masses, self.learned, seed=seed))


class RoutedLayer:
    """The routers of one layer, where its activations are."""

    def __init__(self, routers: LayerRouters, device: torch.device) -> None:
        """Take routers to a device."""
        self.num_experts = len(routers.centres)
        self._labels = routers.labels.to(device)
        self._members = one_hot(self._labels, self.num_experts).float()
        self._centres = routers.centres.to(device)
        first, second = routers.learned
        self._learned = first.to(device), second.to(device)

    def masses(self, z: Tensor) -> Tensor:
        """(positions, experts) float32: sums of |activation|.

        Args:
            z: (positions, width) activations, any floating dtype.
        """
        return z.float().abs() @ self._members

    def scores(self, router: Router, x: Tensor, z: Tensor, *, seed: int) -> Tensor:
        """(positions, experts) float32: the higher, the sooner an expert is kept.

        Args:
            router: what chooses.
            x: (positions, width of the residual stream) inputs of the MLP.
            z: (positions, width) activations, which ``truth`` alone reads.
            seed: of ``random``, whose choice depends on it and on the number of positions alone.
        """
        if router == "truth":
            return self.masses(z)
        if router == "random":
            generator = torch.Generator().manual_seed(seed)
            return torch.rand((len(x), self.num_experts), generator=generator).to(x.device)
        unit = normalize(x.float(), dim=1)
        if router == "centroid":
            # |unit - centre|^2 = 1 - 2 unit * centre + |centre|^2
            return 2 * unit @ self._centres.T - self._centres.square().sum(1)
        return _network(unit, *self._learned)

    def keep(self, z: Tensor, scores: Tensor, num_kept: int) -> Tensor:
        """Activations with zeros outside the chosen experts.

        Args:
            z: (positions, width).
            scores: (positions, experts).
            num_kept: experts to keep of each position.
        """
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen.scatter_(1, scores.topk(num_kept, dim=1).indices, True)
        return torch.where(chosen[:, self._labels], z, 0)

    def kept_mass(self, x: Tensor, z: Tensor, counts: list[int], *, seed: int) -> KeptMass:
        """How much mass each of the routers keeps; arguments as `scores`.

        Args:
            x: inputs of the MLP.
            z: activations.
            counts: numbers of experts to keep.
            seed: of ``random``.
        """
        masses = self.masses(z).double()
        best = _most(masses, masses, counts)
        total = masses.sum(1, keepdim=True)
        kept = [_most(masses, self.scores(r, x, z, seed=seed), counts) for r in ROUTERS]
        return KeptMass(
            len(z),
            torch.stack([_share(part, total) for part in kept]).cpu().numpy(),
            torch.stack([_share(part, best) for part in kept]).cpu().numpy(),
        )


def learn_router(
    x: Tensor, masses: Tensor, start: tuple[Tensor, Tensor], *, seed: int
) -> tuple[Tensor, Tensor]:
    """Teach a network which experts hold a token's mass, from its input of the MLP.

    A linear map onto the experts, tanh, and another of experts, without biases. Targets are masses
    relative to the token's largest. A tenth of the positions is held out, and the epoch is kept
    after which the loss on it is least.

    Args:
        x: (positions, width of the residual stream) float32.
        masses: (positions, experts) float32.
        start: the weights to begin with, as in `LayerRouters`.
        seed: of what is held out, and of the order of batches.

    Returns:
        The weights of both maps, as in `LayerRouters`.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    inputs = normalize(x, dim=1)
    targets = masses / masses.amax(1, keepdim=True).clamp_min(torch.finfo(masses.dtype).tiny)
    num_held_out = max(1, len(x) // _HELD_OUT)
    held_out, rest = order[:num_held_out], order[num_held_out:]
    weights = [weight.clone().requires_grad_() for weight in start]
    optimiser = torch.optim.Adam(weights, lr=_RATE)

    def loss_of(rows: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(_network(inputs[rows], *weights), targets[rows])

    best, least = [weight.detach().clone() for weight in weights], float("inf")
    for _ in range(_EPOCHS):
        for rows in rest[torch.randperm(len(rest), generator=generator)].split(_BATCH):
            optimiser.zero_grad()
            loss_of(rows).backward()
            optimiser.step()
        with torch.no_grad():
            loss = float(loss_of(held_out))
        if loss < least:
            best, least = [weight.detach().clone() for weight in weights], loss
    return best[0], best[1]


def _network(unit: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return torch.tanh(unit @ first.T) @ second.T


def _most(masses: Tensor, scores: Tensor, counts: list[int]) -> Tensor:
    """(positions, counts): mass of the experts of the highest scores."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    return masses.gather(1, order).cumsum(1)[:, [count - 1 for count in counts]]


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """(counts,) sums over positions of a share; all of it where there is nothing."""
    return torch.where(whole > 0, part / whole, 1).sum(0)
