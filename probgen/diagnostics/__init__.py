"""Diagnostics: one question put to a posterior a file."""

from probgen.diagnostics.agree import agree
from probgen.diagnostics.frechet import frechet_distance, frechet_floor
from probgen.diagnostics.loo import loo
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
    "agree",
    "frechet_distance",
    "frechet_floor",
    "image_grid",
    "loo",
    "plot_history",
    "plot_ranks",
    "plot_terms",
    "plot_traces",
    "predict",
    "reconstruction_grid",
    "summary",
]
