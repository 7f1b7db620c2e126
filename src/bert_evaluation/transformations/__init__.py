"""The transformations, and the one registry of them."""

from collections.abc import Iterable

import torch

from bert_evaluation.recipe import Presets, Recipe, compose, parse_recipe
from bert_evaluation.transformation import ReversibleTransformation, Transformation
from bert_evaluation.transformations.arithmetic import ChangeTrueDivToMulByInverse
from bert_evaluation.transformations.attention import FuseAttention
from bert_evaluation.transformations.attention_scale import FoldAttentionScale
from bert_evaluation.transformations.balancing import BalanceLinears
from bert_evaluation.transformations.batchnorm import FuseBatchNorm1dInLinear, FuseBatchNorm2dInConv2d
from bert_evaluation.transformations.chains import ChainLinears
from bert_evaluation.transformations.cleanup import DeepCopy, LintAndRecompile, RemoveDropout
from bert_evaluation.transformations.compilation import Compile
from bert_evaluation.transformations.constants import FoldConstants
from bert_evaluation.transformations.embeddings import CastEmbeddings
from bert_evaluation.transformations.float8 import QuantizeToFloat8
from bert_evaluation.transformations.linear import FuseBiasInLinear, MergeLinears
from bert_evaluation.transformations.masks import HoistMask
from bert_evaluation.transformations.normalization import FuseSkipLayerNorm
from bert_evaluation.transformations.packing import FuseLinearActivation, FuseResidual, PackLinears
from bert_evaluation.transformations.padding import RemovePadding
from bert_evaluation.transformations.precision import CastToBFloat16, CastToFloat16
from bert_evaluation.transformations.pruning import PruneFeedForward, PruneHeads
from bert_evaluation.transformations.quantization import QuantizeLinears
from bert_evaluation.transformations.splitting import SplitLinears
from bert_evaluation.transformations.subexpressions import EliminateCommonSubexpressions
from bert_evaluation.transformations.tanh_gelu import FuseTanhGelu
from bert_evaluation.transformations.tiles import TileAttention, TileLinears

REGISTRY: tuple[type[Transformation], ...] = (
    LintAndRecompile,
    DeepCopy,
    MergeLinears,
    FuseBiasInLinear,
    ChangeTrueDivToMulByInverse,
    RemoveDropout,
    FuseBatchNorm1dInLinear,
    FuseBatchNorm2dInConv2d,
    FoldConstants,
    EliminateCommonSubexpressions,
    FuseAttention,
    FoldAttentionScale,
    HoistMask,
    FuseLinearActivation,
    FuseResidual,
    PackLinears,
    RemovePadding,
    PruneHeads,
    PruneFeedForward,
    BalanceLinears,
    CastToBFloat16,
    CastToFloat16,
    CastEmbeddings,
    QuantizeLinears,
    QuantizeToFloat8,
    FuseTanhGelu,
    SplitLinears,
    TileLinears,
    TileAttention,
    FuseSkipLayerNorm,
    ChainLinears,
    Compile,
)

ORIGINAL = (LintAndRecompile, MergeLinears, FuseBiasInLinear, ChangeTrueDivToMulByInverse, RemoveDropout)


CLEAN = (RemoveDropout, FoldConstants, EliminateCommonSubexpressions, FuseAttention, HoistMask, MergeLinears)
FUSE = (FuseLinearActivation, FuseResidual, FuseSkipLayerNorm, ChainLinears, PackLinears)

BFLOAT16 = (CastEmbeddings, CastToBFloat16, TileLinears, TileAttention, *FUSE)

# Named recipes, for `--recipe exact`. What a processor has no kernels for is refused there and left as it is: `fastest`
# is on integers where there is AVX2, else in bfloat16 where there is that, else in float32; and compiled. Any processor
# can look up in float16.
PRESETS: Presets = {
    "exact": (*CLEAN, TileLinears, TileAttention, *FUSE),
    "bf16": (*CLEAN, *BFLOAT16),
    "int8": (*CLEAN, QuantizeLinears, *BFLOAT16),
    "fastest": (*CLEAN, QuantizeLinears, *BFLOAT16, Compile),
}
# On a GPU a call from Python costs more than most operators, so all of them are compiled.
PRESETS_ON_CUDA: Presets = {
    "exact": (*CLEAN, Compile),
    "bf16": (*CLEAN, CastToBFloat16, RemovePadding, FuseTanhGelu, Compile),
    "fp16": (*CLEAN, CastToFloat16, RemovePadding, FuseTanhGelu, Compile),
    "fp8": (*CLEAN, CastToBFloat16, RemovePadding, QuantizeToFloat8, Compile),
    "fastest": (*CLEAN, CastToBFloat16, RemovePadding, QuantizeToFloat8, Compile),
}


def presets(device: str | torch.device = "cpu") -> Presets:
    """The named recipes for a device."""
    return PRESETS_ON_CUDA if torch.device(device).type == "cuda" else PRESETS


def recipes(texts: Iterable[str], device: str | torch.device = "cpu") -> tuple[Recipe, ...]:
    """The recipes that texts name (see `parse_recipe`); those of the original script for no text."""
    parsed = (parse_recipe(text, REGISTRY, presets(device)) for text in texts)
    return tuple({recipe.name: recipe for recipe in parsed}.values()) or original_recipes()


def original_recipes() -> tuple[Recipe, ...]:
    """The recipes of the original script: each of its transformations alone, then all of them."""
    return (*(compose(kind()) for kind in ORIGINAL), compose(*(kind() for kind in ORIGINAL)))


__all__ = [
    "ORIGINAL",
    "PRESETS",
    "PRESETS_ON_CUDA",
    "REGISTRY",
    "BalanceLinears",
    "CastEmbeddings",
    "CastToBFloat16",
    "CastToFloat16",
    "ChainLinears",
    "ChangeTrueDivToMulByInverse",
    "Compile",
    "DeepCopy",
    "EliminateCommonSubexpressions",
    "FoldAttentionScale",
    "FoldConstants",
    "FuseAttention",
    "FuseBatchNorm1dInLinear",
    "FuseBatchNorm2dInConv2d",
    "FuseBiasInLinear",
    "FuseLinearActivation",
    "FuseResidual",
    "FuseSkipLayerNorm",
    "FuseTanhGelu",
    "HoistMask",
    "LintAndRecompile",
    "MergeLinears",
    "PackLinears",
    "PruneFeedForward",
    "PruneHeads",
    "QuantizeLinears",
    "QuantizeToFloat8",
    "Recipe",
    "RemoveDropout",
    "RemovePadding",
    "ReversibleTransformation",
    "SplitLinears",
    "TileAttention",
    "TileLinears",
    "Transformation",
    "compose",
    "original_recipes",
    "parse_recipe",
    "presets",
    "recipes",
]
