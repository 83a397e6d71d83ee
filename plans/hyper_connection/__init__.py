"""Manifold-constrained hyper-connections: static and dynamic, whole and split around a sublayer, with gradients."""

from plans.hyper_connection.dynamic import DynamicHyperConnectionDescriptor, DynamicHyperConnectionPlan
from plans.hyper_connection.dynamic_backward import (
    DynamicHyperConnectionBackwardDescriptor,
    DynamicHyperConnectionBackwardPlan,
)
from plans.hyper_connection.split import (
    HyperConnectionPostDescriptor,
    HyperConnectionPostPlan,
    HyperConnectionPreDescriptor,
    HyperConnectionPrePlan,
)
from plans.hyper_connection.split_backward import (
    HyperConnectionPostBackwardDescriptor,
    HyperConnectionPostBackwardPlan,
    HyperConnectionPreBackwardDescriptor,
    HyperConnectionPreBackwardPlan,
)
from plans.hyper_connection.static import HyperConnectionArgs, HyperConnectionDescriptor, HyperConnectionPlan
from plans.hyper_connection.static_backward import (
    HyperConnectionBackwardArgs,
    HyperConnectionBackwardDescriptor,
    HyperConnectionBackwardPlan,
)

__all__ = [
    "DynamicHyperConnectionBackwardDescriptor",
    "DynamicHyperConnectionBackwardPlan",
    "DynamicHyperConnectionDescriptor",
    "DynamicHyperConnectionPlan",
    "HyperConnectionArgs",
    "HyperConnectionBackwardArgs",
    "HyperConnectionBackwardDescriptor",
    "HyperConnectionBackwardPlan",
    "HyperConnectionDescriptor",
    "HyperConnectionPlan",
    "HyperConnectionPostBackwardDescriptor",
    "HyperConnectionPostBackwardPlan",
    "HyperConnectionPostDescriptor",
    "HyperConnectionPostPlan",
    "HyperConnectionPreBackwardDescriptor",
    "HyperConnectionPreBackwardPlan",
    "HyperConnectionPreDescriptor",
    "HyperConnectionPrePlan",
]
