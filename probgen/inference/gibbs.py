"""Block Gibbs: layers of units drawn exactly, group after group, each given the others."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro
import torch
from torch import Tensor

from probgen.core import (
    Batch,
    Cost,
    Count,
    Engine,
    InputError,
    NonNegativeInt,
    Pairwise,
    Posterior,
    Target,
    UnsupportedError,
    describe,
)
from probgen.couplings import Couplings
from probgen.kernels.state import ChainState, check_fits
from probgen.moves import State
from probgen.progress import ticker
from probgen.randomness import time_key
from probgen.targets import site_dims


@dataclass(frozen=True)
class Gibbs(Engine):
    """Draws each layer of a Boltzmann machine given the others, observed units held where they are.

    Layers that are not coupled to one another move together; units coupled inside of a layer move one by one. A NaN in
    an observed site is a unit that was not seen: it moves with the rest, which completes the pattern. Where the machine
    is the top of a program, as in a deep belief net, what is below follows by running the program forwards.

    With several temperatures each chain has copies of energies beta E, beta from 1 to 0, and neighbours exchange their
    states by Metropolis: at beta = 0 units are independent and as often on as off, so that no mode keeps a chain.

    Args:
        num_warmup: sweeps before the first draw, >= 0.
        thin: every how manieth sweep is kept, >= 1.
        num_temperatures: copies of each chain, >= 1; only the one at beta = 1 is drawn.

    Source: Geman & Geman (1984), IEEE PAMI 6; exchange: Swendsen & Wang (1986), PRL 57.

    >>> from probgen import infer
    >>> from probgen.models.rbm import example
    >>> half = torch.tensor([[1.0, 0.0, float("nan"), float("nan")]])
    >>> infer(example(), Gibbs(), data={"x": half}, num_draws=5, num_chains=2)["x"].shape
    torch.Size([2, 5, 1, 4])
    """

    num_warmup: NonNegativeInt = 100
    thin: Count = 1
    num_temperatures: Count = 1
    needs = (Pairwise,)
    kind = "mcmc"
    guarantee = "asymptotic"
    conditions = True
    completes = True
    default_chains = 4
    paper: ClassVar[str] = "Geman & Geman 1984, IEEE PAMI 6"
    offers: ClassVar[str] = "exact draws of layer after layer; no step size, nothing is rejected"
    gives_up: ClassVar[str] = (
        "programs without conditionals; modes far apart are seldom left at one temperature"
    )

    def run(
        self,
        target: Target,
        *,
        num_draws: int,
        num_chains: int,
        seed: int,
        init: Posterior | None = None,
        state: Any = None,
        progress: bool = True,
    ) -> Posterior:
        """Draw by sweeps over the layers; see `Engine.run`."""
        started, warmup, before = time.perf_counter(), self.num_warmup, 0
        if state is not None:
            check_fits(state, self, num_chains)
            warmup, before = 0, state.step
            torch.manual_seed(time_key(float(seed), float(before)) % 2**63)  # other noise than up to there
        sweeps = {"warm-up": warmup, "drawing": num_draws * self.thin}
        with torch.no_grad(), ticker("Gibbs", sweeps, progress) as update:
            units = _Units(target, num_chains, self.num_temperatures)
            units.begin(init if state is None else state.kernel)
            kept: dict[str, list[Tensor]] = {site: [] for site in units.free}
            for sweep in range(1, sum(sweeps.values()) + 1):
                units.sweep()
                if sweep > warmup and (sweep - warmup) % self.thin == 0:
                    for site, values in kept.items():
                        values.append(units.coldest(site))
                update(sweep)
            draws = {site: units.as_draws(site, torch.stack(values)) for site, values in kept.items()}
            draws |= _below(target, draws)
        return Posterior(
            draws,
            self.kind,
            self.guarantee,
            str(self),
            Cost(network_calls=sum(sweeps.values()), seconds=time.perf_counter() - started),
            dims={site: _dims(target, site, value.ndim - 2) for site, value in draws.items()},
            run_stats=units.run_stats(sum(sweeps.values())),
            state=ChainState(str(self), before + sum(sweeps.values()), num_chains, units.state, {}),
            target=target,
        )


def _dims(target: Target, site: str, count: int) -> tuple[str, ...]:
    """The names of a site's last dimensions: the plate of a single row is none of its draws."""
    names = site_dims(target.sites[site])
    return names[len(names) - count :]


def _below(target: Target, draws: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sites that are no units of the machine, drawn by running the program forwards from those that are."""
    below = [site for site in target.latents if site not in draws]
    if not below:
        return {}
    shape = next(iter(draws.values())).shape[:-1]
    units = draws | {
        site: value.expand(*shape, -1) for site, value in target.data.items() if site not in draws
    }
    held = pyro.condition(target.program.model, data={site: v.flatten(0, -2) for site, v in units.items()})
    nodes: Any = pyro.poutine.trace(held).get_trace(Batch(num_rows=shape.numel())).nodes
    return {site: nodes[site]["value"].unflatten(0, shape) for site in below}


class _Units:
    """The units of all chains side by side, `(temperatures * chains * rows, n_l)`, some of them held.

    Args:
        target: a Boltzmann machine and what was seen of it.
        num_chains: of each row of the data.
        num_temperatures: copies of each chain; the first are at beta = 1.
    """

    def __init__(self, target: Target, num_chains: int, num_temperatures: int) -> None:
        self.event_shape, self.num_chains = tuple(target.program.event_shape), num_chains
        self.rows = (target.batch.size,) if target.data else ()
        self.columns = num_chains * (target.batch.size if target.data else 1)
        self.num_temperatures = num_temperatures
        whole: Couplings = target.program.couplings()
        if not target.data.keys() <= set(whole.sites):
            raise UnsupportedError(
                f"Gibbs moves the layers {', '.join(whole.sites)} of {describe(target.program)}, and cannot hold "
                f"{', '.join(target.data.keys() - set(whole.sites))}. Guide() draws what is latent given x."
            )
        self.device = whole.biases[whole.sites[0]].device
        self.couplings, self.betas = whole, torch.linspace(1, 0, num_temperatures, device=self.device)
        if num_temperatures > 1:
            base = {s: b if s in whole.scales else torch.zeros_like(b) for s, b in whole.biases.items()}
            self._ends = whole, Couplings({}, base, whole.scales)
            self.couplings = whole.between(base, self.betas.repeat_interleave(self.columns)[:, None])
        self.given = {
            site: value.flatten(1).repeat(num_temperatures * num_chains, 1).to(whole.biases[site].dtype)
            for site, value in target.data.items()
        }
        self.free = [
            site for site in whole.sites if site not in self.given or bool(self.given[site].isnan().any())
        ]
        self.state: State = {}
        pairs = max(num_temperatures - 1, 1)
        self._parity, self._exchanged = 0, torch.zeros(pairs, self.columns, device=self.device)

    def begin(self, start: Any) -> None:
        """Every unit that is not held at random, or where a posterior or a state ended."""
        at_random = self.couplings.zeros(self.num_temperatures * self.columns)
        for site, value in at_random.items():
            if start is not None and site in self.free:
                at_random[site] = self._started(site, start, value)
            elif site in self.couplings.scales:
                bias, scale = self.couplings.biases[site], self.couplings.scales[site]
                at_random[site] = bias + scale * torch.randn_like(value)
            else:
                at_random[site] = torch.rand_like(value).round()
        self.state = {site: self._with_held(site, value) for site, value in at_random.items()}

    def sweep(self) -> None:
        """Draw every layer once, those that are independent together; then exchange temperatures."""
        for group in self.couplings.colours:
            for site in group:
                if site in self.free:
                    self.state[site] = self._draw(site)
        if self.num_temperatures > 1:
            self._exchange()

    def coldest(self, site: str) -> Tensor:
        """A layer at beta = 1: `(chains * rows, n_l)`."""
        return self.state[site][: self.columns].clone()

    def as_draws(self, site: str, values: Tensor) -> Tensor:
        """`(draws, chains * rows, n)` -> `(chains, draws, *rows, *event)`."""
        event = self.event_shape if site == "x" else values.shape[2:]
        return values.reshape(len(values), self.num_chains, *self.rows, *event).transpose(0, 1).contiguous()

    def run_stats(self, num_sweeps: int) -> dict[str, Tensor]:
        """How often neighbours exchanged their states, by chain (and row), the neighbours last."""
        if self.num_temperatures == 1:
            return {}
        rate = 2 * self._exchanged / max(num_sweeps, 1)
        return {"exchange_rate": rate.mT.reshape(self.num_chains, *self.rows, -1)}

    def _exchange(self) -> None:
        """Neighbours r, s = r + 1 swap with probability min(1, exp((beta_r - beta_s)(E_r - E_s))), E above the base."""
        energy = self._ends[0].energy(self.state) - self._ends[1].energy(self.state)
        energy = energy.reshape(self.num_temperatures, self.columns)
        order = torch.arange(self.num_temperatures, device=self.device)[:, None].repeat(1, self.columns)
        for r in range(self._parity, self.num_temperatures - 1, 2):
            log_ratio = (self.betas[r] - self.betas[r + 1]) * (energy[r] - energy[r + 1])
            swapped = torch.rand(self.columns, device=self.device).log() < log_ratio
            order[r, swapped], order[r + 1, swapped] = r + 1, r
            self._exchanged[r] += swapped
        self._parity = 1 - self._parity
        column = torch.arange(self.columns, device=self.device)
        for site, value in self.state.items():
            by_temperature = value.unflatten(0, (self.num_temperatures, self.columns))
            self.state[site] = by_temperature[order, column].flatten(0, 1)

    def _draw(self, site: str) -> Tensor:
        held = self.given.get(site)
        if held is not None and (site, site) in self.couplings.weights:
            return self.couplings.draw(site, self.state, held=~held.isnan())
        return self._with_held(site, self.couplings.draw(site, self.state))

    def _with_held(self, site: str, value: Tensor) -> Tensor:
        given = self.given.get(site)
        return value if given is None else torch.where(given.isnan(), value, given)

    def _started(self, site: str, start: Any, like: Tensor) -> Tensor:
        values = start[site]
        if isinstance(start, Posterior):
            values = values[:, -1].reshape(-1, like.shape[-1]).repeat(self.num_temperatures, 1)
        if values.shape != like.shape:
            raise InputError(
                f"Gibbs cannot start at site {site!r} from values of shape {tuple(values.shape)}: it needs "
                f"{tuple(like.shape)}, one row a chain, datum and temperature."
            )
        return values.to(like)


def example() -> Gibbs:
    """A short one."""
    return Gibbs(num_warmup=20)
