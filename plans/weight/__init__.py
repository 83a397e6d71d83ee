"""Weight deltas of adapters and what becomes of them: :class:`WeightPlan` and its descriptor."""

from plans.weight.descriptor import Sink, WeightArgs, WeightDescriptor, WeightLayout
from plans.weight.plan import WeightPlan
from plans.weight.sources import ChannelScale, Dense, Hadamard, Kronecker, LowRank, Source

__all__ = [
    "ChannelScale",
    "Dense",
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
