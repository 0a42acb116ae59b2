# SPDX-License-Identifier: Apache-2.0
"""A suggestion for people: the run, the rules and how far to trust them, the rates to try and what they cost."""

from __future__ import annotations

from ds_blockwise.optimizers.registry import OPTIMIZERS
from ds_blockwise.runs.rates.scaling_rules import RULES, FittedRange, ScalingRule
from ds_blockwise.runs.rates.suggestion import AROUND, PAPER_UNIT, SAME_AS_ADAMW, Suggestion

_FAR = 2.0  # times the rule's own batch


def text_of(
    found: Suggestion,
    sequence_length: int | None,
    hours: tuple[str, float, float] | None,
    *,
    has_router: bool,
) -> list[str]:
    """The lines to print.

    Args:
        found: the suggestion.
        sequence_length: of the batch, where it is known.
        hours: a GPU, and the best and worst GPU-hours of the bracket on it.
        has_router: whether the model is a mixture of experts.
    """
    size = found.size
    step = f"{size.batch:,} tokens"
    if sequence_length is not None:
        step += f" ({size.batch // sequence_length:,} x {sequence_length:,})"
    experts = ", all experts counted" if has_router else ""
    return [
        f"model    {size.parameters:,} parameters: {size.layers:,} in layers, {size.embedding:,} in embeddings, "
        f"{size.output:,} in the output layer",
        f"run      {size.tokens:,} tokens = {size.steps:,} steps of {step}",
        f"compute  {_short(size.flops)} FLOPs{experts}",
        "",
        "AdamW's peak rate for pre-training, by published rules",
        *_rules(found),
        "",
        f"start: lr {found.lr:g} ({found.rule.name})",
        *_doubts(found),
        "",
        *_optimizers(found),
        "",
        *_bracket(found, hours),
        "",
        "Known: the rules are fits to other people's sweeps. Our own, at 1.3M and 5.0M parameters, far below all fits,",
        "found AdamW's best rate 1.3 to 3.4 times below Step Law's, and that of ours at 0.7 to 1 times AdamW's.",
        "Not known: your data, schedule and betas move the best rate. Above 5.0M parameters we have measured nothing.",
    ]


def _rules(found: Suggestion) -> list[str]:
    rows = [("", "lr", "its batch, tokens", "this run")]
    for rule in RULES:
        batch = f"{rule.batch(found.size):,.0f}"
        rows.append((f"{rule.name} ({rule.source})", f"{rule.lr(found.size):.2g}", batch, _where(rule, found)))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [f"  {a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}" for a, b, c, d in rows]
    return [*lines, *(f"  {rule.name}: {rule.formula}" for rule in RULES)]


def _where(rule: ScalingRule, found: Suggestion) -> str:
    outside = {fitted.name for fitted in rule.outside(found.size)}
    said = [_range(fitted, inside=fitted.name not in outside) for fitted in rule.ranges(found.size)]
    return ("OUTSIDE the fit: " if outside else "inside the fit: ") + "; ".join(said)


def _range(fitted: FittedRange, *, inside: bool) -> str:
    relation = "in" if inside else "not in"
    return f"{fitted.name} {_short(fitted.value)} {relation} {_short(fitted.low)} to {_short(fitted.high)}"


def _short(value: float) -> str:
    return f"{value:g}" if value < 100 else f"{value:.1e}".replace("e+0", "e").replace("e+", "e")


def _doubts(found: Suggestion) -> list[str]:
    rates = [rule.lr(found.size) for rule in RULES]
    lines = [f"  The rules differ by a factor of {max(rates) / min(rates):.1f} here."]
    if found.rule.outside(found.size):
        lines.append("  No rule was fitted on such runs: this is an extrapolation. Try the whole bracket.")
    ratio = found.size.batch / found.rule.batch(found.size)
    if not 1 / _FAR <= ratio <= _FAR:
        lines.append(
            f"  Your batch is {ratio:.2g} times the one that goes with it. A rule's rate holds at its own batch; a "
            f"{'smaller' if ratio < 1 else 'larger'} one usually wants a {'lower' if ratio < 1 else 'higher'} rate."
        )
    return lines


def _optimizers(found: Suggestion) -> list[str]:
    others = sorted(OPTIMIZERS.keys() - set(SAME_AS_ADAMW))
    width = max(map(len, (*SAME_AS_ADAMW, *others)))
    return [
        'rate by optimizer, and for "lr_multipliers": "paper", whose unit is an eighth of AdamW\'s',
        f"  {'AdamW':<{width}}  {found.lr:g}",
        *(f"  {name:<{width}}  {found.lr:g}  {found.lr * PAPER_UNIT:.2g}" for name in SAME_AS_ADAMW),
        *(f"  {name:<{width}}  no published rule" for name in others),
    ]


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _bracket(found: Suggestion, hours: tuple[str, float, float] | None) -> list[str]:
    runs, tokens = len(found.bracket), len(found.bracket) * found.size.tokens
    cost = f"{tokens:,} tokens, {_short(found.bracket_flops)} FLOPs"
    if hours is not None:
        gpu, best, worst = hours
        cost += f", {_hours(best)} to {_hours(worst)} GPU-hours on {gpu}"
    small = runs == len(AROUND)
    how = (
        "around it"
        if small
        else "upward: the paper's own point is 8 times AdamW's rate, where we have measured nothing"
    )
    end = "an edge" if small else "the upper edge"
    return [
        f"try {', '.join(f'{lr:g}' for lr in found.bracket)} ({how})",
        f"  {runs} complete runs: {cost}",
        f"  If {end} is best, go on beyond it. Shorter runs are cheaper, but each needs its own decay to min_lr, and",
        "  the best rate of a short run is not that of a long one.",
    ]
