"""A planner on a terminal: prompt → plan, each type's ids beside the text, and what the text
becomes when ids are changed."""

import re
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from sememe.console import write
from sememe.detokenize import decode
from sememe.errors import CheckpointError, DataError, SememeError
from sememe.show import colour


def write_planned(
    loaded,
    tokenizer,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    show_plan: bool,
    edits: list[str],
    console: Console,
) -> dict[str, Any]:
    """Plans, writes, and prints; with `edits` the text of the changed plan too, of the same random
    numbers.

    Returns prompt, text, new_tokens, plan (a list of ids for each type), and with edits `edits` and
    `edited` (plan, text, new_tokens). Raises SememeError for an edit that cannot be made, DataError
    for a prompt without a token."""
    import torch

    shape = loaded.config.plan_shape
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids.to(
        loaded.device
    )
    if not ids.shape[1]:
        raise DataError(
            'the prompt has no token: need text that the tokenizer knows. try: --prompt "What is a plan?"'
        )
    longest = loaded.config.get_text_config().max_position_embeddings
    if max(1 + ids.shape[1], max_new_tokens) + shape.slots + shape.types + 1 > longest:
        raise DataError(
            f"the prompt has {ids.shape[1]} tokens and {max_new_tokens} are to be written, beside "
            "plans of "
            f"{shape.slots} concepts: need at most {longest} places for each. try: a shorter "
            "prompt or a smaller "
            "--max-new-tokens"
        )
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}

    def draw() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    plan_BP = loaded.plan(ids, torch.ones_like(ids), generator=draw(), **sampling)[0][:, 0]
    plans = [shape.unpack(plan_BP.cpu())[0]]
    if edits:
        plans.append(edited(plans[0], edits, shape))
    made = []
    for plan in plans:
        new = loaded.write(shape.pack([plan]), max_new_tokens, generator=draw(), **sampling)[0]
        text = decode(tokenizer, new, skip_special_tokens=True)
        if show_plan or edits:
            console.print(plan_line(plan, plans[0]), soft_wrap=True)
        write(f"{text}\n", console=console)
        made.append({"plan": plan, "text": text, "new_tokens": len(new)})
    return {"prompt": prompt, **made[0]} | ({"edits": edits, "edited": made[1]} if edits else {})


def plan_line(plan: list[list[int]], before: list[list[int]]) -> Text:
    """`type 0 ⟨3⟩⟨17⟩  type 1 ⟨5⟩`; what differs from `before` stands out."""
    line = Text()
    for i, ids in enumerate(plan):
        line.append(f"{'  ' if i else ''}type {i} ", style="dim")
        for j, concept in enumerate(ids):
            changed = j >= len(before[i]) or before[i][j] != concept
            line.append(
                f"⟨{concept}⟩", style=f"{'bold reverse ' if changed else ''}{colour(concept)}"
            )
        if not ids:
            line.append("–", style="dim")
    return line


def edited(plan: list[list[int]], edits: list[str], shape) -> list[list[int]]:
    """The plan with ids put in as `TYPE:SLOT=ID` says, slots counted from 0; the slot behind the
    last one makes it longer."""
    made = [list(ids) for ids in plan]
    for word in edits:
        match = re.fullmatch(r"(\d+):(\d+)=(\d+)", word.strip())
        if match is None:
            raise SememeError(
                f"--edit {word!r}: need TYPE:SLOT=ID, in whole numbers. try: --edit 0:0=1"
            )
        kind, slot, concept = map(int, match.groups())
        if kind >= shape.types:
            raise SememeError(
                f"--edit {word}: this planner has types 0 to {shape.types - 1}, need one of them. "
                "try: --edit 0:0=1"
            )
        if concept >= shape.sizes[kind]:
            raise SememeError(
                f"--edit {word}: type {kind} has ids 0 to {shape.sizes[kind] - 1}, need one of "
                "them. "
                f"try: --edit {kind}:{slot}={shape.sizes[kind] - 1}"
            )
        last = min(len(made[kind]), shape.lengths[kind] - 1)
        if slot > last:
            raise SememeError(
                f"--edit {word}: type {kind} of this plan has {len(made[kind])} of at most "
                f"{shape.lengths[kind]} "
                f"concepts, need a slot from 0 to {last}. try: --edit {kind}:{last}={concept}"
            )
        made[kind][slot : slot + 1] = [concept]
    return made


def check_options(
    model: str,
    planner: bool,
    show_concepts: bool,
    show_plan: bool,
    edits: list[str],
    top_p: float,
    budget: Sequence[int],
) -> None:
    """Raises CheckpointError for an option that says nothing about this kind of model."""
    for option, given in (("--edit", edits), ("--show-plan", show_plan), ("--budget", budget)):
        if given and not planner:
            raise CheckpointError(
                f"{model} makes no plans: need a run of system: planner. try: without {option}"
            )
    if planner and show_concepts:
        raise CheckpointError(
            f"{model} is a planner, its concepts stand ahead of the text: need --show-plan. try: "
            "--show-plan"
        )
    if planner and top_p < 1:
        raise CheckpointError(
            f"{model} is a planner, which samples from all of a distribution: got top_p = "
            f"{top_p:g}, need 1. "
            "try: --temperature 0.7"
        )
