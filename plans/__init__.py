"""
Plans: what is to be computed, which kernel does it, and what it guarantees.

plan = SomePlan.select(stream, descriptor, PlanPreference())
plan.run(stream, workspace, args)
"""
