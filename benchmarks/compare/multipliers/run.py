# SPDX-License-Identifier: Apache-2.0
"""Should ``"auto"`` follow the signal-to-noise ratio, and does ``"tuned"`` want more than rates? Rules before runs.

python -m benchmarks.compare.multipliers.run             # ten runs or so, four minutes each on one core
python -m benchmarks.compare.multipliers.run --minutes 30

**auto.** A run of AdamW with its best rate gives the ratios, at a third of a whole run (candidates.py says how). With
the first seed, both powers of the ratio train at AdamW's best rate; the better one also at half of it and at twice it,
and on while an edge is best. If it ends below ``"auto"``, that gets the two neighbours of its published rate. If it
ends above by more than `WORTH_CONFIRMING`, it has lost. Else the best rate of each trains the other seeds. The SNR
becomes what ``"auto"`` means if over all seeds its mean difference to ``"auto"`` is below 0 by more than two standard
errors; else sharpness stays, and the SNR does not enter the package.

**tuned.** Each addition trains with the first seed at the rate of the published runs of ``"tuned"``. What gains more
than `WORTH_SEEDS` trains the other seeds. It enters the preset if the mean over all seeds is below 0 by more than two
standard errors and no seed that came later lost; else the pages say that it gained nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.compare import report
from benchmarks.compare.ablations import WORTH_CONFIRMING
from benchmarks.compare.multipliers import candidates
from benchmarks.compare.multipliers.candidates import ADAMW, ADDITIONS, AUTO, EXPONENTS, TUNED, TYPES
from benchmarks.compare.results import Estimate, Results, against, best_of, loss_of
from benchmarks.compare.run import Asked, Trials, answer, parser_of
from benchmarks.compare.trials import ARMS, FULL, Trial
from benchmarks.provenance import read_csv as read_rows
from ds_blockwise.blocks.settings.defaults import LR_PRESETS

ASKED = Asked("multipliers", counted=("compare",))
OWN, READINGS = ASKED.csv, report.DOCS / "snr.csv"
COMPARED = report.DOCS / "compare.csv"
FOLDER = ASKED.folder
SEEDS = range(1, FULL.seeds + 1)
LEAST_RATES = 3
WIDEN = 1  # how often a grid may grow
WORTH_SEEDS = 0.005  # nats
SNR_WORDS = {"snr-inverse": "SNR to the power -1/2", "snr": "SNR to the power 1/2"}


@dataclass(frozen=True)
class Question:
    """What is compared, once the ratios have been read.

    Attributes:
        published: Trials by preset, each at its best rate.
        snr: Signal-to-noise ratio by block type.
    """

    published: Mapping[str, Sequence[Trial]]
    snr: Mapping[str, float]

    @property
    def lr(self) -> float:
        """AdamW's best rate."""
        return self.published[ADAMW][0].lr

    def by_snr(self, change: str, lr: float, seed: int = 1) -> Trial:
        """A run with the multipliers of one power of the ratios."""
        return candidates.by_snr(change, candidates.multipliers(self.snr, EXPONENTS[change]), lr, seed)

    def better_power(self, results: Results) -> str:
        """The one whose run at AdamW's best rate ended lower."""
        return best_of(results, [self.by_snr(change, self.lr) for change in EXPONENTS]).change

    def tried(self, results: Results) -> list[Trial]:
        """The runs of the first seed with multipliers from the ratios."""
        rates = sorted({trial.lr for trial in results if trial.change in EXPONENTS})
        trials = [self.by_snr(change, lr) for change in EXPONENTS for lr in rates]
        return [trial for trial in trials if trial in results]

    def auto(self, results: Results) -> list[Trial]:
        """The runs of ``"auto"`` at the best of its rates, every seed."""
        first = self.published[AUTO][0]
        rates = (first.lr / 2, first.lr, 2 * first.lr)
        best = best_of(results, [t for lr in rates if (t := replace(first, lr=lr)) in results])
        return [replace(best, seed=seed) for seed in SEEDS]

    def additions(self, change: str) -> list[Trial]:
        """``"tuned"`` and one thing more, every seed."""
        return [candidates.addition(change, trial) for trial in self.published[TUNED]]


def train(trials: Trials, published: Mapping[str, Sequence[Trial]]) -> Question:
    """Everything, in the order of the rules.

    Raises:
        Stopped: The time is up.
    """
    trials.train([t for of_preset in published.values() for t in of_preset], "published")
    if not READINGS.is_file():
        short = candidates.measuring(published[ADAMW][0].lr)
        trials.train([short], "measuring")
        candidates.keep_readings(FOLDER / short.name / "settings", READINGS)
    question = Question(published, candidates.ratios(READINGS))
    trials.train([question.by_snr(change, question.lr) for change in EXPONENTS], "powers of the ratio")
    trials.train([question.additions(change)[0] for change in ADDITIONS], "additions")
    best, auto = _swept(trials, question), question.published[AUTO][0]
    behind = loss_of(trials.results, best) - loss_of(trials.results, auto)
    if behind < 0:
        trials.train([replace(auto, lr=lr) for lr in (auto.lr / 2, 2 * auto.lr)], "rates of auto")
    if behind <= WORTH_CONFIRMING:
        trials.train([*(replace(best, seed=seed) for seed in SEEDS), *question.auto(trials.results)], "seeds")
    worth = [change for change in ADDITIONS if _gain(trials.results, question, change) > WORTH_SEEDS]
    trials.train([trial for change in worth for trial in question.additions(change)], "seeds of additions")
    return question


def _swept(trials: Trials, question: Question) -> Trial:
    """The better power of the ratios at the best of its rates, by the first seed."""
    change = question.better_power(trials.results)
    grid = [question.lr / 2, question.lr, 2 * question.lr]
    for grown in range(WIDEN + 1):
        trials.train([question.by_snr(change, lr) for lr in grid], "rates")
        best = best_of(trials.results, [question.by_snr(change, lr) for lr in grid])
        if grown == WIDEN or grid[0] < best.lr < grid[-1]:
            break
        grid = [grid[0] / 2, *grid] if best.lr == grid[0] else [*grid, 2 * grid[-1]]
    return best


def _gain(results: Results, question: Question, change: str) -> float:
    """Of the first seed, in nats."""
    return loss_of(results, question.published[TUNED][0]) - loss_of(results, question.additions(change)[0])


def read(published: Mapping[str, Sequence[Trial]]) -> tuple[Question, Results]:
    """The question, and what has been trained for it, from the published files."""
    question, named = Question(published, candidates.ratios(READINGS)), report.named_in(OWN)
    rates = [question.lr * 2.0**power for power in range(-2, 3)]
    known = [trial for of_preset in published.values() for trial in of_preset]
    known += [question.by_snr(change, lr, seed) for change in EXPONENTS for lr in rates for seed in SEEDS]
    known += [replace(t, lr=factor * t.lr) for t in published[AUTO] for factor in (0.5, 2)]
    known += [trial for change in ADDITIONS for trial in question.additions(change)]
    return question, {trial: named[trial.name] for trial in known if trial.name in named}


def ratios_table(question: Question) -> str:
    """What was read, and the multipliers that follow."""
    powers = [candidates.multipliers(question.snr, exponent) for exponent in EXPONENTS.values()]
    lines = [
        f'| block type | SNR | {" | ".join(SNR_WORDS.values())} | `"tuned"` |',
        "|---|---:|---:|---:|---:|",
    ]
    for kind in TYPES:
        cells = [f"{of_power[kind]:g}" for of_power in (*powers, LR_PRESETS["tuned"])]
        lines.append(f"| {kind} | {question.snr[kind]:.3f} | {' | '.join(cells)} |")
    of = read_rows(READINGS)[0]
    source = (
        f"SNR: geometric means over the readings of steps {candidates.READ_FROM} to {candidates.MEASURING_STEPS}, one "
        f"each {candidates.SPACING} steps, in a run of AdamW of that length at a rate of {question.lr:g}, first seed; "
        f"{of['cpu']}, torch {of['torch']}, {of['date']}, commit {of['commit']}."
    )
    return "\n".join([*lines, "", source])


def results_table(question: Question, results: Results) -> str:
    """Each choice of multipliers at its best rate, and the verdict."""
    auto = [trial for trial in question.auto(results) if trial in results]
    lines = [
        '| multipliers | rates tried | best lr | final validation loss, nats | minus `"auto"`\'s, nats |',
        "|---|---:|---:|---:|---:|",
    ]
    shown = {name: list(trials) for name, trials in question.published.items()} | {AUTO: auto}
    of_power = {change: _best_of_power(question, results, change) for change in EXPONENTS}
    shown |= {SNR_WORDS[change]: trials for change, trials in of_power.items() if trials}
    for name, trials in shown.items():
        difference = against(results, trials, auto)
        rates = {t.lr for t in results if (t.arm, t.change) == (trials[0].arm, trials[0].change)}
        cells = (
            str(len(rates)) if name in (AUTO, *SNR_WORDS.values()) else "as published",
            f"{_in_adamw_unit(trials[0]):g}",
            Estimate.of([loss_of(results, trial) for trial in trials]).text(),
            "" if difference is None else difference.text("+.4f"),
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    words = "No verdict yet: runs are missing."
    if all(of_power.values()):
        change = question.better_power(results)
        words = _verdict(results, SNR_WORDS[change], of_power[change], auto) or words
    return "\n".join([*lines, "", words, "", _source(results, [t for trials in shown.values() for t in trials])])


def _best_of_power(question: Question, results: Results, change: str) -> list[Trial]:
    """All seeds at the best rate; none without runs."""
    tried = [trial for trial in question.tried(results) if trial.change == change]
    if not tried:
        return []
    best = best_of(results, tried)
    return [trial for seed in SEEDS if (trial := replace(best, seed=seed)) in results]


def _verdict(results: Results, name: str, trials: Sequence[Trial], auto: Sequence[Trial]) -> str:
    """By the rule; empty while it needs more runs."""
    rates = {t.lr for t in results if t.change == trials[0].change}
    difference = against(results, trials, auto)
    assert difference is not None
    behind = loss_of(results, trials[0]) - loss_of(results, auto[0])
    is_decided = difference.seeds == len(SEEDS) or behind > WORTH_CONFIRMING
    if len(rates) < LEAST_RATES or not is_decided:
        return ""
    wins = "wins" if difference.sign < 0 else "does not win"
    return f'By the rule: {name} **{wins}** against `"auto"` ({difference.text("+.4f")}).'


def additions_table(question: Question, results: Results) -> str:
    """Each addition against `"tuned"` with the same seeds."""
    tuned = question.published[TUNED]
    lines = [
        '| added to `"tuned"` | final validation loss, nats | minus that of `"tuned"`, nats | enters the preset |',
        "|---|---:|---:|---|",
    ]
    loss = Estimate.of([loss_of(results, trial) for trial in tuned])
    lines.append(f"| nothing | {loss.text()} | | |")
    shown = list(tuned)
    for change, (words, _) in ADDITIONS.items():
        trials = [trial for trial in question.additions(change) if trial in results]
        if not trials:
            lines.append(f"| {words} | not trained yet | | |")
            continue
        difference = against(results, trials, tuned)
        assert difference is not None
        loss = Estimate.of([loss_of(results, trial) for trial in trials])
        enters = "yes" if _enters(results, trials, tuned) else "no"
        lines.append(f"| {words} | {loss.text()} | {difference.text('+.4f')} | {enters} |")
        shown += trials
    return "\n".join([*lines, "", _source(results, shown)])


def _enters(results: Results, trials: Sequence[Trial], tuned: Sequence[Trial]) -> bool:
    difference = against(results, trials, tuned)
    later = against(results, trials[1:], tuned)
    if difference is None or later is None or difference.seeds < len(SEEDS):
        return False
    worst = max(loss_of(results, new) - loss_of(results, old) for new, old in zip(trials[1:], tuned[1:], strict=True))
    return difference.sign < 0 and worst < 0


def _in_adamw_unit(trial: Trial) -> float:
    """The base rate; the published runs of ours are in the unit of the paper's norms."""
    is_uniform = trial.params.get("lr_multipliers", {}).get("preset") == "uniform"
    return trial.lr if is_uniform else ARMS[trial.arm].adamw_rate(trial.lr)


def _source(results: Results, shown: Sequence[Trial]) -> str:
    rates = "Rates are chosen with the first seed; multipliers from ratios are of one run of AdamW."
    return report.provenance_text({trial: results[trial] for trial in shown}, FULL, rates=rates)


def tables(question: Question, results: Results) -> Iterator[tuple[str, str]]:
    """Mark in the page, and what stands there."""
    yield "snr ratios", ratios_table(question)
    if question.tried(results):
        yield "snr results", results_table(question, results)
    if all(trial in results for trial in question.published[TUNED]):
        yield "tuned additions", additions_table(question, results)


def main() -> int:
    """The exit status of `answer`."""
    options = parser_of(__doc__).parse_args()
    published = candidates.published(report.read_csv(COMPARED, FULL))

    def of_files() -> Iterator[tuple[Path, str, str]]:
        if READINGS.is_file():
            for mark, text in tables(*read(published)):
                yield report.COMPARISONS, mark, text

    return answer(ASKED, options, lambda trials: train(trials, published), of_files)


if __name__ == "__main__":
    sys.exit(main())
