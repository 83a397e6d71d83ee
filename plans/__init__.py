"""Plans: what is to be computed, which kernel does it, and what it guarantees.

    plan = WeightPlan.select(stream, descriptor, PlanPreference())
    plan.run(stream, workspace, args)

Families: :mod:`plans.weight` (deltas and merges of adapters), :mod:`plans.cast`, :mod:`plans.layout`.
"""
