"""Solving diffusions and flows in time: the one place that knows torchsde and torchdiffeq, our steppers beside them.

`fields` says what a program looks like to a solver, `engine` is what its engines share, the others solve.
"""

from probgen.dynamics.engine import FlowEngine, floating_weight
from probgen.dynamics.fields import (
    AffineDenoiser,
    ClockedField,
    GaussianInitial,
    Initial,
    Velocity,
    family_field,
    flow_field,
    reverse_drift,
    reversed_schedule,
)
from probgen.dynamics.likelihood import Likelihood
from probgen.dynamics.paths import trajectories
from probgen.dynamics.steppers import (
    FIXED_STEP,
    SolverError,
    WholeBatch,
    check_tolerances,
    dopri5,
    dopri5_along,
    fixed_step,
    listed,
)
from probgen.dynamics.torch_ode import ODE_ADAPTIVE, ODE_FIXED, solve_ode
from probgen.dynamics.torch_sde import (
    SDE_METHODS,
    Brownian,
    check_sde_method,
    integrate_sde,
    sde_states,
    solve_sde,
)
from probgen.dynamics.trace import estimated_divergence, exact_divergence

__all__ = [
    "FIXED_STEP",
    "ODE_ADAPTIVE",
    "ODE_FIXED",
    "SDE_METHODS",
    "AffineDenoiser",
    "Brownian",
    "ClockedField",
    "FlowEngine",
    "GaussianInitial",
    "Initial",
    "Likelihood",
    "SolverError",
    "Velocity",
    "WholeBatch",
    "check_sde_method",
    "check_tolerances",
    "dopri5",
    "dopri5_along",
    "estimated_divergence",
    "exact_divergence",
    "family_field",
    "fixed_step",
    "floating_weight",
    "flow_field",
    "integrate_sde",
    "listed",
    "reverse_drift",
    "reversed_schedule",
    "sde_states",
    "solve_ode",
    "solve_sde",
    "trajectories",
]
