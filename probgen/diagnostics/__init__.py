"""Diagnostics: one question put to a posterior a file."""

from probgen.diagnostics.agreement import agree
from probgen.diagnostics.backward_heat import backward_heat
from probgen.diagnostics.c2st import c2st
from probgen.diagnostics.calibration import SimulatedPosteriors, simulated_posteriors
from probgen.diagnostics.chain_chi_square import chain_chi_square
from probgen.diagnostics.chi_square import chi_square
from probgen.diagnostics.coverage import coverage
from probgen.diagnostics.densities import exact_density, noised_density
from probgen.diagnostics.flow_plots import plot_flow
from probgen.diagnostics.fokker_planck import fokker_planck
from probgen.diagnostics.frechet import frechet_distance, frechet_floor
from probgen.diagnostics.landscape import landscape
from probgen.diagnostics.lipschitz import lipschitz
from probgen.diagnostics.loo import loo
from probgen.diagnostics.mesh import Mesh
from probgen.diagnostics.plots import (
    image_grid,
    plot_history,
    plot_ranks,
    plot_terms,
    plot_traces,
    reconstruction_grid,
)
from probgen.diagnostics.predict import predict
from probgen.diagnostics.predictive import plot_predictive
from probgen.diagnostics.roc import plot_roc, roc
from probgen.diagnostics.sbc import sbc
from probgen.diagnostics.sliced_wasserstein import sliced_wasserstein
from probgen.diagnostics.summary import summary
from probgen.diagnostics.tarp import tarp
from probgen.diagnostics.unit_plots import plot_fantasies, plot_filters, plot_recall

__all__ = [
    "Mesh",
    "SimulatedPosteriors",
    "agree",
    "backward_heat",
    "c2st",
    "chain_chi_square",
    "chi_square",
    "coverage",
    "exact_density",
    "fokker_planck",
    "frechet_distance",
    "frechet_floor",
    "image_grid",
    "landscape",
    "lipschitz",
    "loo",
    "noised_density",
    "plot_fantasies",
    "plot_filters",
    "plot_flow",
    "plot_history",
    "plot_predictive",
    "plot_ranks",
    "plot_recall",
    "plot_roc",
    "plot_terms",
    "plot_traces",
    "predict",
    "reconstruction_grid",
    "roc",
    "sbc",
    "simulated_posteriors",
    "sliced_wasserstein",
    "summary",
    "tarp",
]
