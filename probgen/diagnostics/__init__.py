"""Diagnostics: one question put to a posterior a file."""

from probgen.diagnostics.agree import agree
from probgen.diagnostics.backward_heat import backward_heat
from probgen.diagnostics.chi_square import chi_square
from probgen.diagnostics.densities import exact_density, noised_density
from probgen.diagnostics.flow_plots import plot_flow
from probgen.diagnostics.fokker_planck import fokker_planck
from probgen.diagnostics.frechet import frechet_distance, frechet_floor
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
from probgen.diagnostics.summary import summary

__all__ = [
    "Mesh",
    "agree",
    "backward_heat",
    "chi_square",
    "exact_density",
    "fokker_planck",
    "frechet_distance",
    "frechet_floor",
    "image_grid",
    "lipschitz",
    "loo",
    "noised_density",
    "plot_flow",
    "plot_history",
    "plot_ranks",
    "plot_terms",
    "plot_traces",
    "predict",
    "reconstruction_grid",
    "summary",
]
