"""What of a request a model cannot serve, said before any work."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from transformers import PreTrainedModel

from sememe.concepts.plan import PlanShape
from sememe.engine.requests import GREEDY, Request, Unserved
from sememe.errors import DataError
from sememe.models.loading import check_rate, longest_text

PLANNED = ("prompt", "max_tokens", "sampling", "ends", "plan", "budget", "temperature", "seed")
"""Fields that a planner does something with."""


def check_prompt(model: PreTrainedModel, request: Request) -> int:
    """Returns the size of the vocabulary. Raises DataError."""
    vocabulary = model.get_input_embeddings().num_embeddings
    if not request.prompt or not all(0 <= token < vocabulary for token in request.prompt):
        raise DataError(
            f"the prompt has {len(request.prompt)} tokens: need at least one, each from 0 to "
            f"{vocabulary - 1}. try: the model's own tokenizer"
        )
    return vocabulary


def check_request(model: PreTrainedModel, request: Request) -> None:
    """Raises Unserved for a plan, of which there is none; DataError for a prompt that is empty, of
    tokens that are none, or too long, or for a bias of such tokens; RecipeError or CheckpointError
    for a rate that cannot be had."""
    for name in ("plan", "budget"):
        if getattr(request, name) is not None:
            raise Unserved(
                f"sememe.{name}",
                f"got a {name}, and this model writes none: need a planner. try: without {name}",
            )
    vocabulary = check_prompt(model, request)
    if not all(0 <= token < vocabulary for token in request.sampling.logit_bias):
        raise DataError(
            f"logit_bias names a token that is none: need ids from 0 to {vocabulary - 1}. "
            "try: the model's own tokenizer"
        )
    if not 0 <= (request.logprobs or 0) <= vocabulary:
        raise DataError(
            f"got logprobs of {request.logprobs} tokens: need at most {vocabulary}. try: fewer"
        )
    longest = longest_text(model.config, bos=False)
    if len(request.prompt) + request.max_tokens > longest:
        raise DataError(
            f"the prompt has {len(request.prompt)} tokens and {request.max_tokens} are to be "
            f"written: need at most {longest} together. try: a shorter prompt, or fewer max_tokens"
        )
    if request.rate is not None:
        check_rate(model.config, request.rate, "the model")


def check_planned(model: PreTrainedModel, request: Request, longest: int) -> None:
    """Raises Unserved for what a planner does not do, or a plan or budget that is not of its types;
    DataError for a prompt that is empty, of tokens that are none, or more than `longest`, or for as
    many that are to be written."""
    shape = model.config.plan_shape
    for sent, usual in ((request, Request(())), (request.sampling, GREEDY)):
        for name in (x.name for x in fields(sent)):
            if name not in PLANNED and getattr(sent, name) != getattr(usual, name):
                name = "sememe.rate" if name == "rate" else name
                raise Unserved(
                    name,
                    f"got {name}, which a planner does nothing with: need a request without it. "
                    "try: temperature and seed",
                )
    check_prompt(model, request)
    if 1 + len(request.prompt) > longest or not 1 <= request.max_tokens <= longest:
        raise DataError(
            f"the prompt has {len(request.prompt)} tokens and {request.max_tokens} are to be "
            f"written: need at most {longest - 1}, and 1 to {longest}. try: a shorter prompt, or "
            "fewer max_tokens"
        )
    check_plan(shape, request)


def check_plan(shape: PlanShape, request: Request) -> None:
    """Raises Unserved for a plan or a budget that is not of these types."""
    plan, budget = request.plan, request.budget
    if plan is not None and budget is not None:
        raise Unserved(
            "sememe.budget", "got a plan and a budget for one: need one of them. try: the plan"
        )
    longest = ", ".join(map(str, shape.lengths))

    def of_types(values: Sequence[Any], right: Callable[..., bool]) -> bool:
        return len(values) == shape.types and all(map(right, values, shape.lengths, shape.sizes))

    def fits(ids: Sequence[int], length: int, size: int) -> bool:
        return len(ids) <= length and all(0 <= i < size for i in ids)

    if plan is not None and not of_types(plan, fits):
        raise Unserved(
            "sememe.plan",
            f"the plan is none of this model: need {shape.types} lists, of at most {longest} ids, "
            f"each below {', '.join(map(str, shape.sizes))}. try: the plan of an answer, changed",
        )
    if budget is not None and len(budget) == 1:
        budget = [*budget] * shape.types
    if budget is not None and not of_types(budget, lambda n, length, _: 0 <= n <= length):
        raise Unserved(
            "sememe.budget",
            f"the budget is none of this model: need {shape.types} numbers of concepts, at most "
            f"{longest}, or one for all. try: those",
        )
