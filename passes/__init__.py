"""Built-in passes. Importing this package registers every one of them; nothing walks folders."""

if __name__ != "graphprune.passes":
    raise ImportError(f"{__name__!r} is part of graphprune: import graphprune.passes")

from graphprune.passes.budget.budget import Budget as Budget
from graphprune.passes.cleanup.batch_norm import FoldBatchNorm as FoldBatchNorm
from graphprune.passes.cleanup.constants import FoldConstants as FoldConstants
from graphprune.passes.cleanup.dead import RemoveDeadNodes as RemoveDeadNodes
from graphprune.passes.cleanup.merge_lora import MergeLora as MergeLora
from graphprune.passes.cleanup.noops import RemoveNoOps as RemoveNoOps
from graphprune.passes.cleanup.parametrizations import (
    FoldParametrizations as FoldParametrizations,
)
from graphprune.passes.cleanup.recalibrate import RecalibrateBatchNorm as RecalibrateBatchNorm
from graphprune.passes.control.recover import PruneRecover as PruneRecover
from graphprune.passes.control.repeat import Repeat as Repeat
from graphprune.passes.quantize.quantize import Quantize as Quantize
from graphprune.passes.sparsity.least_squares import LeastSquares as LeastSquares
from graphprune.passes.sparsity.magnitude import Magnitude as Magnitude
from graphprune.passes.sparsity.sparsegpt import SparseGPT as SparseGPT
from graphprune.passes.sparsity.sparsellm import SparseLLM as SparseLLM
from graphprune.passes.sparsity.wanda import Wanda as Wanda
from graphprune.passes.structural.axis import PruneAxis as PruneAxis
from graphprune.passes.structural.drop_sublayers import DropSublayers as DropSublayers
from graphprune.passes.structural.heads import PruneHeads as PruneHeads
from graphprune.passes.structural.neurons import PruneNeurons as PruneNeurons
from graphprune.passes.structural.shrink import Shrink as Shrink
from graphprune.passes.training.distill import Distill as Distill
from graphprune.passes.training.finetune import Finetune as Finetune
from graphprune.passes.training.gradual_magnitude import GradualMagnitude as GradualMagnitude
from graphprune.passes.training.gradual_structure import GradualStructure as GradualStructure
from graphprune.passes.training.l1 import L1 as L1
from graphprune.passes.training.neuroprune import NeuroPrune as NeuroPrune

__all__ = [
    "L1",
    "Budget",
    "Distill",
    "DropSublayers",
    "Finetune",
    "FoldBatchNorm",
    "FoldConstants",
    "FoldParametrizations",
    "GradualMagnitude",
    "GradualStructure",
    "LeastSquares",
    "Magnitude",
    "MergeLora",
    "NeuroPrune",
    "PruneAxis",
    "PruneHeads",
    "PruneNeurons",
    "PruneRecover",
    "Quantize",
    "RecalibrateBatchNorm",
    "RemoveDeadNodes",
    "RemoveNoOps",
    "Repeat",
    "Shrink",
    "SparseGPT",
    "SparseLLM",
    "Wanda",
]
