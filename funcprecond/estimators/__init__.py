"""Estimates of traces, diagonals, spectra and eigenpairs, and statistics of a batch's gradients."""

from funcprecond.estimators.diagonals import hutchinson_diagonal, xdiag
from funcprecond.estimators.eigenpairs import eigsh
from funcprecond.estimators.gradient_statistics import per_sample_gram, per_sample_norms
from funcprecond.estimators.noise_scale import NoiseScale, gradient_noise_scale
from funcprecond.estimators.probes import Estimate, draw_probes
from funcprecond.estimators.spectral_densities import SpectralDensity, spectral_density
from funcprecond.estimators.tangent_kernel import ntk
from funcprecond.estimators.traces import hutchinson_trace, hutchpp, xtrace

__all__ = [
    "Estimate",
    "NoiseScale",
    "SpectralDensity",
    "draw_probes",
    "eigsh",
    "gradient_noise_scale",
    "hutchinson_diagonal",
    "hutchinson_trace",
    "hutchpp",
    "ntk",
    "per_sample_gram",
    "per_sample_norms",
    "spectral_density",
    "xdiag",
    "xtrace",
]
