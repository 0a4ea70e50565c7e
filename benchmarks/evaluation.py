"""What an evaluation costs beside the plain way, which asks the model once for each metric: time, padded positions, memory, and how far scores lie apart.

    python benchmarks/evaluation.py [--json] [--questions 16] [--repeats 2]

Rows are TOFU's (the pocket's where ../shared is missing; then no ratio is held to a bound): under Llama-3's tokenizer on a random Llama of 14 M parameters, their
ids folded into a vocabulary of 32,000, and under stories260K's own with "Question: " and "Answer: ". Times are of --questions questions of forget10,
retain and holdout10 and a quarter as many of real authors and world facts, at equal steps through the files; one thread, both ways in
turn, the best of --repeats. With all attacks: forget answers ten times, holdout answers seven times, in the plain way; ours scores them once with
moments and once more for the other model of the reference attack. Padded positions are those of the whole of TOFU, base metrics.
Memory is the peak of the allocator's events in the base metrics, full batches in both ways. mia_gradnorm, which goes backward through the model, is in neither and timed apart, one
forget row after another in both ways. Generation answers twice as many questions, until an id of `Case.stop`.
Exit code 1 where a bound is missed. About six minutes.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import evaluation_plain as plain
import torch
from evaluation_data import Asked, Case, made_cases
from methods import peak_mib

from fedunlearn.data.chat import EncodedRow
from fedunlearn.evals.generation import generate_ids
from fedunlearn.evals.gradnorm import gradient_norms
from fedunlearn.evals.scoring import plan_batches, score_rows
from fedunlearn.records.evaluation import AnswerScore, Detail

BATCH_TOKENS = 8192
APART = 1e-4
MEMORY = 1.0
Scores = dict[EncodedRow, AnswerScore]


@dataclass(frozen=True)
class Measured:
    """One case. base, attacks, generation, gradnorm: seconds of the plain way over ours; positions, memory_mib, seconds: plain and ours.

    apart: largest difference of any loss, probability, token's log-probability, as it is and standardised (min-k++), and relative of any gradient norm. same_texts: share of equal generations.
    """

    case: str
    base: float
    attacks: float
    generation: float
    gradnorm: float
    positions: tuple[int, int]
    memory_mib: tuple[float, float]
    apart: float
    same_texts: float
    seconds: dict[str, tuple[float, float]]
    faults: tuple[str, ...] = ()


def wanted_of(case: Case, attacks: bool) -> dict[EncodedRow, Detail]:
    """What the metrics need of each row; of an answer in two sets the more."""
    forget, *_, holdout = case.sets
    wanted = {row: Detail.LOSS for asked in case.sets for rows in asked.rows for row in rows}
    return wanted | dict.fromkeys([*forget.plain, *holdout.plain], Detail.MOMENTS if attacks else Detail.TOKENS)


def ours(case: Case, attacks: bool) -> Scores:
    """One pass; with all attacks a second one over the plain answers, for the other model."""
    found = score_rows(case.model, wanted_of(case, attacks), pad_id=0, batch_tokens=BATCH_TOKENS)
    if attacks:
        forget, *_, holdout = case.sets
        other = dict.fromkeys([*forget.plain, *holdout.plain], Detail.LOSS)
        score_rows(case.model, other, pad_id=0, batch_tokens=BATCH_TOKENS)
    return found


def our_positions(case: Case) -> int:
    """Places of all batches for the whole of TOFU."""
    rows = {row for asked in case.whole for rows in asked.rows for row in rows}
    batches = plan_batches(case.model, rows, batch_tokens=BATCH_TOKENS)
    return sum(len(batch) * max(map(len, batch)) for batch in batches)


def our_generations(case: Case) -> list[list[int]]:
    """New ids of each prompt."""
    config = case.model.generation_config
    config.eos_token_id = list(case.stop)
    chat = case.chat
    before, chat.pad_id = chat.pad_id, 0
    try:
        found = generate_ids(
            case.model, chat, case.prompts, batch_size=plain.BATCH, max_new_tokens=plain.MAX_NEW_TOKENS
        )
    finally:
        chat.pad_id = before
    return [list(found[prompt]) for prompt in case.prompts]


def largest_difference(case: Case) -> float:
    """Over all that the plain way makes of all rows, its log-softmax in float64; hits left out (a tie may fall either way)."""
    found = ours(case, attacks=True)
    once = {(work, rows[0]): (rows, work) for _, rows, work in plain.passes(case.sets, attacks=True)}
    return max(
        difference(work, made, found[row])
        for rows, work in once.values()
        if work is not plain.hits
        for row, made in zip(rows, plain.run(case, rows, work, exact=True), strict=True)
    )


def gradients_apart(case: Case, rows: list[EncodedRow]) -> float:
    """Largest relative difference of a row's gradient norm."""
    pairs = zip(plain.gradient_norms(case, rows), gradient_norms(case.model, rows, "model"), strict=True)
    return max(abs(slow - fast) / slow for slow, fast in pairs)


def difference(work: plain.Work, made: float | torch.Tensor, score: AnswerScore) -> float:
    """Between what the plain way makes of a row and our score."""
    if work is plain.losses:
        return max(abs(made - score.avg_loss), abs(math.exp(-made) - score.prob))
    logp = torch.from_numpy(score.tokens.logp)[:-1]
    if work is plain.token_logps:
        return float((made - logp).abs().max()) if len(logp) else 0.0
    kept = torch.stack([torch.from_numpy(x)[:-1] for x in (score.tokens.mu, score.tokens.sigma2)])
    one, other = ((logp - mu) / sigma2.clamp(min=1e-6).sqrt() for mu, sigma2 in (kept, made))
    return float((one - other).abs().max()) if len(logp) else 0.0


def best_in_turn(first: Callable[[], object], second: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Shortest seconds of each, run in turn."""
    best = [float("inf"), float("inf")]
    for _ in range(repeats):
        for place, work in enumerate((first, second)):
            began = time.perf_counter()
            work()
            best[place] = min(best[place], time.perf_counter() - began)
    return best[0], best[1]


def peaks(case: Case) -> tuple[float, float]:
    """Both ways on one full batch of the plain way, which ours takes with all its wrong answers, for full batches of its own."""
    forget, holdout = (asked.rows[: plain.BATCH] for asked in (case.whole[0], case.whole[-1]))
    first = replace(case, sets=(Asked("forget10", tuple(rows[:1] for rows in forget)), Asked("holdout10", holdout)))
    full = replace(case, sets=(Asked("forget10", forget), Asked("holdout10", holdout)))
    return peak_mib(lambda: plain.score(first, False)), peak_mib(lambda: ours(full, False))


def measure(case: Case, repeats: int) -> Measured:
    """All figures of one case."""
    rows = list(case.sets[0].plain)
    apart = max(largest_difference(case), gradients_apart(case, rows))
    texts: dict[str, list[list[int]]] = {}
    seconds = {
        "base": best_in_turn(lambda: plain.score(case, False), lambda: ours(case, False), repeats),
        "attacks": best_in_turn(lambda: plain.score(case, True), lambda: ours(case, True), repeats),
        "generation": best_in_turn(
            lambda: texts.update(plain=plain.generate(case)), lambda: texts.update(ours=our_generations(case)), repeats
        ),
        "gradnorm": best_in_turn(
            lambda: plain.gradient_norms(case, rows), lambda: gradient_norms(case.model, rows, "model"), repeats
        ),
    }
    found = Measured(
        case=case.name,
        **{name: slow / fast for name, (slow, fast) in seconds.items()},
        positions=(plain.padded_positions(case.whole), our_positions(case)),
        memory_mib=peaks(case),
        apart=apart,
        same_texts=sum(a == b for a, b in zip(texts["plain"], texts["ours"], strict=True)) / len(case.prompts),
        seconds=seconds,
    )
    return replace(found, faults=tuple(faults_of(found, case)))


def faults_of(found: Measured, case: Case) -> list[str]:
    """What misses its bound."""
    faults = [] if found.apart <= APART else [f"scores lie {found.apart:.1e} apart, more than {APART:g}"]
    if case.bounds is None:
        return faults
    for name, bound in asdict(case.bounds).items():
        ratio = found.positions[0] / found.positions[1] if name == "positions" else getattr(found, name)
        if ratio < bound:
            faults.append(f"{name}: {ratio:.2f} x fewer than the plain way, bound {bound}")
    if found.memory_mib[1] > MEMORY * found.memory_mib[0]:
        faults.append("memory: {:.0f} MiB in the plain way, {:.0f} MiB in ours".format(*found.memory_mib))
    return faults


def shown(found: Measured, case: Case) -> str:
    """A few lines of text."""
    lines = [found.case]
    for name, (slow, fast) in found.seconds.items():
        held = getattr(case.bounds, name, None)
        bound = "" if held is None else f" (bound {held})"
        lines.append(f"  {name:11} plain {slow:6.2f} s, ours {fast:6.2f} s: {slow / fast:.2f} x{bound}")
    slow, fast = found.positions
    bound = "" if case.bounds is None else f" (bound {case.bounds.positions})"
    lines.append(f"  positions   plain {slow}, ours {fast}: {slow / fast:.2f} x{bound}")
    lines.append("  memory      plain {:.0f} MiB, ours {:.0f} MiB (bound: no more)".format(*found.memory_mib))
    lines.append(
        f"  scores at most {found.apart:.1e} apart (bound {APART:g}); equal generations: {found.same_texts:.0%}"
    )
    return "\n".join([*lines, *("  FAIL " + fault for fault in found.faults)])


def main() -> int:
    """Measures, tells, and gives 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="figures as JSON")
    parser.add_argument("--questions", type=int, default=16, help="questions of forget10, retain and holdout10")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each way, of which the best counts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        cases = made_cases(args.questions, Path(folder))
    measured = [measure(case, args.repeats) for case in cases]
    if args.json:
        print(json.dumps([asdict(found) for found in measured], indent=2))
    else:
        print("\n".join(shown(found, case) for found, case in zip(measured, cases, strict=True)))
    return 1 if any(found.faults for found in measured) else 0


if __name__ == "__main__":
    sys.exit(main())
