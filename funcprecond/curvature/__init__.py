"""Stage 1: which curvature matrix a method uses.

Each file has a need, and many have a function for direct calls too. A need states what is measured
on a batch; ``fp.observe(problem, params, batch, needs)`` measures it.
"""

from funcprecond.curvature.batch_weight import BatchWeight, Weight
from funcprecond.curvature.ggn import GGNOperator
from funcprecond.curvature.gradient import BatchGradient, OuterProduct
from funcprecond.curvature.hessian import HessianOperator, HessianProbes, Probes
from funcprecond.curvature.layer_statistics import ExampleRows, LayerStatistics
from funcprecond.curvature.objective import Objective, ObjectiveFunctions
from funcprecond.curvature.per_sample import PerSample, PerSampleGrads
from funcprecond.curvature.quadratic_form import GGNForm
from funcprecond.curvature.residual_rows import ResidualRows, Residuals
from funcprecond.curvature.sampled_gradient import SampledGradient, SampledGradients
from funcprecond.curvature.sketch import Sketch
from funcprecond.layers.blocks import Layers
from funcprecond.layers.layer_call import LayerUse

__all__ = [
    "BatchGradient",
    "BatchWeight",
    "ExampleRows",
    "GGNForm",
    "GGNOperator",
    "HessianOperator",
    "HessianProbes",
    "LayerStatistics",
    "LayerUse",
    "Layers",
    "Objective",
    "ObjectiveFunctions",
    "OuterProduct",
    "PerSample",
    "PerSampleGrads",
    "Probes",
    "ResidualRows",
    "Residuals",
    "SampledGradient",
    "SampledGradients",
    "Sketch",
    "Weight",
]
