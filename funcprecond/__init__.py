"""Gradient preconditioning as pure functions: ``θ ← θ − η P g``.

A method is a choice of curvature (which matrix is measured), representation (how it is stored) and
solver (how ``P g`` is computed with it). ``__all__`` below lists the whole public interface, in the
order in which a training loop uses it. The parts for methods of your own are in the packages
:mod:`~funcprecond.curvature`, :mod:`~funcprecond.representation` and :mod:`~funcprecond.solver`.
"""

from funcprecond import (
    curvature,
    estimators,
    linalg,
    losses,
    methods,
    operators,
    optim,
    representation,
    solver,
    transforms,
    tree,
)
from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.checkpoint import from_dict, load, save, to_dict
from funcprecond.composition import Composed, NoRepresentation, NoSolver, compose
from funcprecond.curvature.fisher import fisher_mv
from funcprecond.curvature.ggn import ggn_mv
from funcprecond.curvature.hessian import hvp
from funcprecond.curvature.jacobian import jvp, linearize, vjp
from funcprecond.curvature.layer_statistics import layer_statistics
from funcprecond.curvature.per_sample import per_sample_grads
from funcprecond.estimators import plots
from funcprecond.estimators.diagonals import hutchinson_diagonal, xdiag
from funcprecond.estimators.eigenpairs import eigsh
from funcprecond.estimators.gradient_statistics import per_sample_gram, per_sample_norms
from funcprecond.estimators.noise_scale import NoiseScale, gradient_noise_scale
from funcprecond.estimators.probes import Estimate
from funcprecond.estimators.spectral_densities import SpectralDensity, spectral_density
from funcprecond.estimators.tangent_kernel import ntk
from funcprecond.estimators.traces import hutchinson_trace, hutchpp, xtrace
from funcprecond.evidence import Evidence, MissingEvidence, Noise, draw, observe
from funcprecond.linalg.solution import NotConverged, Solution, Stop
from funcprecond.methods.adagrad import adagrad, adagrad_full
from funcprecond.methods.adahessian import adahessian
from funcprecond.methods.adam import adam, adamw
from funcprecond.methods.adaptive_kfac import adaptive_kfac
from funcprecond.methods.caspr import caspr
from funcprecond.methods.diagonal_ng import diagonal_ng
from funcprecond.methods.ekfac import ekfac
from funcprecond.methods.engd import engd
from funcprecond.methods.eva import eva
from funcprecond.methods.eva_s import eva_s
from funcprecond.methods.foof import foof
from funcprecond.methods.ggt import ggt
from funcprecond.methods.hessian_free import hessian_free
from funcprecond.methods.kfac import kfac
from funcprecond.methods.kflr import kflr
from funcprecond.methods.kl_shampoo import kl_shampoo
from funcprecond.methods.lbfgs import lbfgs
from funcprecond.methods.mfac import mfac
from funcprecond.methods.muon import muon
from funcprecond.methods.natural_gradient import layerwise_ng, natural_gradient
from funcprecond.methods.one_sided_shampoo import one_sided_shampoo
from funcprecond.methods.seng import seng
from funcprecond.methods.sgd import sgd
from funcprecond.methods.shampoo import shampoo
from funcprecond.methods.singd import singd
from funcprecond.methods.skfac import skfac
from funcprecond.methods.smw_gn import smw_gn
from funcprecond.methods.smw_ng import smw_ng
from funcprecond.methods.soap import soap
from funcprecond.methods.splus import splus
from funcprecond.methods.spring import spring
from funcprecond.methods.sr import sr
from funcprecond.methods.tnt import tnt
from funcprecond.methods.tonga import tonga
from funcprecond.methods.tonga_unit import tonga_unit
from funcprecond.methods.unit_ng import unit_ng
from funcprecond.need import Every, Need
from funcprecond.operators.curvature_matrices import GGN, Fisher, Hessian
from funcprecond.operators.diagonal import DiagonalGGN
from funcprecond.operators.kronecker_factored import KroneckerFactored
from funcprecond.operators.low_rank import LowRank
from funcprecond.operators.nystrom_sketch import nystrom, nystrom_cg
from funcprecond.operators.operator import Operator
from funcprecond.problems import Problem, problem
from funcprecond.representation.average import RisingDecay
from funcprecond.residual_problems import residuals, vmc
from funcprecond.step import make_step, make_update
from funcprecond.transform import Transform, apply, chain
from funcprecond.transforms.accumulate import accumulate
from funcprecond.transforms.clip import clip_norm
from funcprecond.transforms.graft import graft
from funcprecond.transforms.kl_clip import kl_clip
from funcprecond.transforms.momentum import momentum
from funcprecond.transforms.partition import assign, partition
from funcprecond.transforms.routing import muon_rules
from funcprecond.transforms.scale import scale
from funcprecond.transforms.skip_nonfinite import skip_nonfinite
from funcprecond.transforms.weight_decay import weight_decay

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 - in groups, by use
    # State a problem, and measure it.
    "Problem",
    "problem",
    "residuals",
    "vmc",
    "Evidence",
    "MissingEvidence",
    "Noise",
    "draw",
    "observe",
    "Every",
    "Need",
    "Evaluation",
    # The methods.
    "adagrad",
    "adagrad_full",
    "adahessian",
    "adam",
    "adamw",
    "adaptive_kfac",
    "caspr",
    "diagonal_ng",
    "ekfac",
    "engd",
    "eva",
    "eva_s",
    "foof",
    "ggt",
    "hessian_free",
    "kfac",
    "kflr",
    "kl_shampoo",
    "layerwise_ng",
    "lbfgs",
    "mfac",
    "muon",
    "natural_gradient",
    "one_sided_shampoo",
    "seng",
    "sgd",
    "shampoo",
    "singd",
    "skfac",
    "smw_gn",
    "smw_ng",
    "soap",
    "splus",
    "spring",
    "sr",
    "tnt",
    "tonga",
    "tonga_unit",
    "unit_ng",
    # Methods of one's own, from the three stages.
    "Composed",
    "NoRepresentation",
    "NoSolver",
    "compose",
    "RisingDecay",
    # What is chained around a method.
    "Transform",
    "apply",
    "chain",
    "accumulate",
    "clip_norm",
    "graft",
    "kl_clip",
    "momentum",
    "assign",
    "partition",
    "muon_rules",
    "scale",
    "skip_nonfinite",
    "weight_decay",
    # A whole step as one function; saving and resuming.
    "make_step",
    "make_update",
    "from_dict",
    "load",
    "save",
    "to_dict",
    # Products with a curvature matrix, and what the examples and layers give.
    "fisher_mv",
    "ggn_mv",
    "hvp",
    "jvp",
    "linearize",
    "vjp",
    "layer_statistics",
    "per_sample_grads",
    # Curvature matrices as linear operators, and solves with them.
    "Operator",
    "GGN",
    "Fisher",
    "Hessian",
    "DiagonalGGN",
    "KroneckerFactored",
    "LowRank",
    "nystrom",
    "nystrom_cg",
    "NotConverged",
    "Solution",
    "Stop",
    # Estimates of what a matrix is too large to show.
    "Estimate",
    "hutchinson_trace",
    "hutchpp",
    "xtrace",
    "hutchinson_diagonal",
    "xdiag",
    "eigsh",
    "SpectralDensity",
    "spectral_density",
    "per_sample_gram",
    "per_sample_norms",
    "NoiseScale",
    "gradient_noise_scale",
    "ntk",
    "plots",
    # The packages.
    "curvature",
    "estimators",
    "linalg",
    "losses",
    "methods",
    "operators",
    "optim",
    "representation",
    "solver",
    "transforms",
    "tree",
]


def __dir__() -> list[str]:
    return sorted(__all__)
