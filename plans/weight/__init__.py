"""Weight deltas of adapters and what becomes of them: :class:`WeightPlan`, and many at once in a group."""

from plans.weight.descriptor import Sink, WeightArgs, WeightDescriptor, WeightLayout
from plans.weight.grouped import GroupedWeightArgs, GroupedWeightDescriptor, GroupedWeightPlan
from plans.weight.plan import WeightPlan
from plans.weight.sources import ChannelScale, Dense, Hadamard, Kronecker, LowRank, Source

__all__ = [
    "ChannelScale",
    "Dense",
    "GroupedWeightArgs",
    "GroupedWeightDescriptor",
    "GroupedWeightPlan",
    "Hadamard",
    "Kronecker",
    "LowRank",
    "Sink",
    "Source",
    "WeightArgs",
    "WeightDescriptor",
    "WeightLayout",
    "WeightPlan",
]
