"""The parts of a recipe that pairs and plans are trained by: typed, each check where its key is."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

PROPOSERS = ("beam", "diverse", "sample", "edit", "gradient")  # of models/planner/proposers.py


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class Plan(Strict):
    """What a `planner` writes ahead of a text."""

    sizes: list[int] = [64, 512]
    """Ids of each type of concept; types may be levels, coarse ones first."""
    lengths: list[int] = [2, 8]
    """Concepts of each type at most."""
    begins: Literal["pieces", "words"] = "pieces"
    """What ids stand for at first: `words`, key words of the target; `pieces`, clusters of the
    words in its pieces."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the targets that the executor learns to write without a plan."""
    parallel: bool = False
    """Types are written at the same time, each from the source alone; else each also from those
    before it."""
    multi_token: int = Field(1, ge=1)
    """Concepts that one step of the planner writes."""
    weight: float = Field(1.0, ge=0)
    """Of the plan's own cross entropy in the loss: nats per concept, beside nats per target
    token."""
    straight_through: bool = False
    """What the executor reads passes its gradient on to the planner."""
    signals: float = Field(0.0, ge=0)
    """Of what linear probes of the plan lose on the target's length, kind, names, numbers and key
    words: nats per label."""

    @model_validator(mode="after")
    def _types_fit(self) -> "Plan":
        if not self.sizes or len(self.sizes) != len(self.lengths):
            raise ValueError(
                f"sizes = {self.sizes} and lengths = {self.lengths}: need one of each for every "
                "type"
            )
        if min(self.sizes) < 2 or min(self.lengths) < 1:
            raise ValueError(
                f"sizes = {self.sizes} and lengths = {self.lengths}: need at least 2 ids and 1 "
                "concept in each type"
            )
        if self.multi_token > max(self.lengths):
            raise ValueError(
                f"multi_token = {self.multi_token}: need at most {max(self.lengths)}, the longest "
                "type's concepts"
            )
        return self


class Em(Strict):
    """Hard EM: which plans are searched for, and when. The run has three stages: the executor
    learns the plans that k-means of the targets starts from (`warmup`), then the planner learns
    them too (`distil`), then better ones are searched for."""

    every: int = Field(50, ge=0)
    """Steps between E-steps; 0: never."""
    proposers: dict[str, int] = {"beam": 4, "sample": 4, "edit": 8}
    """Candidates that each way of proposing adds, beside the incumbent."""
    examples: int = Field(0, ge=0)
    """Pairs of one E-step at most, those first that are trained on next; 0: all that the steps up
    to the next one see."""
    batch: int = Field(8, ge=1)
    """Pairs whose candidates are scored at once."""
    planner_weight: float = Field(1.0, ge=0)
    """Of the plan's nats in its score log p(y | z) + planner_weight · log p(z | u)."""
    warmup: float = Field(0.1, ge=0, le=1)
    """Share of the run in which the executor and the concepts learn alone."""
    distil: float = Field(0.1, ge=0, le=1)
    """Share of the run, behind it, in which the planner learns those plans before any search."""

    @field_validator("proposers")
    @classmethod
    def _known(cls, proposers: dict[str, int]) -> dict[str, int]:
        for name, count in proposers.items():
            if name not in PROPOSERS:
                raise ValueError(
                    f"{name!r} is no way to propose plans, need some of {', '.join(PROPOSERS)}"
                )
            if count < 0:
                raise ValueError(f"{count} candidates of {name!r}, need at least 0")
        return proposers

    @model_validator(mode="after")
    def _stages_fit(self) -> "Em":
        if self.warmup + self.distil > 1:
            raise ValueError(
                f"warmup = {self.warmup} and distil = {self.distil} are more than the run, need at "
                "most 1 together"
            )
        if self.every and not any(self.proposers.values()):
            raise ValueError(
                f"every = {self.every} without proposers, need candidates to choose from"
            )
        return self

    def starts(self, steps: int) -> int:
        """Steps done before the first E-step."""
        return round((self.warmup + self.distil) * steps)


class Curriculum(Strict):
    """Short texts first: what is trained on of a target grows to all of it."""

    start: int = Field(0, ge=0)
    """Target tokens at the first step; 0: all of them from the start."""
    until: float = Field(0.5, gt=0, le=1)
    """Share of the run at which targets are whole."""

    def length(self, step: int, steps: int, whole: int) -> int:
        """Target tokens that step number `step` trains on, of at most `whole`."""
        if self.start == 0 or step >= self.until * steps:
            return whole
        return min(whole, self.start + int((whole - self.start) * step / (self.until * steps)))
