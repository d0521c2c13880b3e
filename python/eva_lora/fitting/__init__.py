"""A and B fitted to a weight: what the float weights were, what of the difference each direction gives back, and what
that repairs.

Knows weights, the layers they are in and statistics of these layers' inputs; does not know how a pass is made.
"""

from .base_samples import difference, quantization_of, samples_of
from .float_weights import FloatWeights, LayerWeights
from .gradients import GradientFit, fit_drawn, fit_leading, importances, ranks_by_importance, sketch_columns
from .in_sequence import fit_in_sequence
from .layer_fit import LayerFit, completed, fit_layer, no_preference
from .measuring import ModelErrors, added_by, layer_errors, missing_of, model_errors
from .methods import METHODS, GradientMethod, Method, MethodFit, Moment, fit_method, known_directions

__all__ = [
    "METHODS",
    "FloatWeights",
    "GradientFit",
    "GradientMethod",
    "LayerFit",
    "LayerWeights",
    "Method",
    "MethodFit",
    "ModelErrors",
    "Moment",
    "added_by",
    "completed",
    "difference",
    "fit_drawn",
    "fit_in_sequence",
    "fit_layer",
    "fit_leading",
    "fit_method",
    "importances",
    "known_directions",
    "layer_errors",
    "missing_of",
    "model_errors",
    "no_preference",
    "quantization_of",
    "ranks_by_importance",
    "samples_of",
    "sketch_columns",
]
