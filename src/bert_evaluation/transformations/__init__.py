"""The transformations, and the one registry of them."""

from bert_evaluation.recipe import Recipe, compose, parse_recipe
from bert_evaluation.transformation import ReversibleTransformation, Transformation
from bert_evaluation.transformations.arithmetic import ChangeTrueDivToMulByInverse
from bert_evaluation.transformations.batchnorm import FuseBatchNorm1dInLinear, FuseBatchNorm2dInConv2d
from bert_evaluation.transformations.cleanup import DeepCopy, LintAndRecompile, RemoveDropout
from bert_evaluation.transformations.linear import FuseBiasInLinear, MergeLinears
from bert_evaluation.transformations.packing import FuseLinearActivation, FuseResidual, PackLinears
from bert_evaluation.transformations.precision import CastToBFloat16
from bert_evaluation.transformations.quantization import QuantizeLinears

REGISTRY: tuple[type[Transformation], ...] = (
    LintAndRecompile,
    DeepCopy,
    MergeLinears,
    FuseBiasInLinear,
    ChangeTrueDivToMulByInverse,
    RemoveDropout,
    FuseBatchNorm1dInLinear,
    FuseBatchNorm2dInConv2d,
    FuseLinearActivation,
    FuseResidual,
    PackLinears,
    CastToBFloat16,
    QuantizeLinears,
)

ORIGINAL = (LintAndRecompile, MergeLinears, FuseBiasInLinear, ChangeTrueDivToMulByInverse, RemoveDropout)


def original_recipes() -> tuple[Recipe, ...]:
    """The recipes of the original script: each of its transformations alone, then all of them."""
    return (*(compose(kind()) for kind in ORIGINAL), compose(*(kind() for kind in ORIGINAL)))


__all__ = [
    "ORIGINAL",
    "REGISTRY",
    "CastToBFloat16",
    "ChangeTrueDivToMulByInverse",
    "DeepCopy",
    "FuseBatchNorm1dInLinear",
    "FuseBatchNorm2dInConv2d",
    "FuseBiasInLinear",
    "FuseLinearActivation",
    "FuseResidual",
    "LintAndRecompile",
    "MergeLinears",
    "PackLinears",
    "QuantizeLinears",
    "Recipe",
    "RemoveDropout",
    "ReversibleTransformation",
    "Transformation",
    "compose",
    "original_recipes",
    "parse_recipe",
]
