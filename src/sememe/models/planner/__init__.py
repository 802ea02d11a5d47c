"""The planner: source → plan of typed concepts → text."""

from sememe.models.planner.model import PlannerForCausalLM, PlannerOutput

__all__ = ["PlannerForCausalLM", "PlannerOutput"]
