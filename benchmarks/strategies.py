"""The whole story on the pocket with every server optimiser and every way to average LoRA: one Markdown table.

    python benchmarks/strategies.py [--seed 0] [--only fedadam flora ...] [--saves saves/strategies]

Four clients fine-tune, two of them are asked to forget an author each, everything else as in `make demo`; the oracle is FedAvg's with
plain averaging. Columns: mean probability of the forget answers and model utility after fine-tuning and after unlearning, the largest
aggregation error of a round (||exact mean of the products - what is sent|| / ||exact mean||, before the server optimiser's step), and bytes a client and
round, down and up, over all of both runs. About eight minutes on two cores.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from fedunlearn.doors.demo import Demo
from fedunlearn.evals.files import EVAL_FILE
from fedunlearn.federation.checkpoint import read_history
from fedunlearn.reporting.console import set_logging

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
NAMED = "model.model_args.pretrained_model_name_or_path="


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is said on the command line of both stages, and of one alone.

    The adaptive optimisers move every entry by about server_lr a round: ten rounds of a fresh adapter want more than the default 1e-3,
    four rounds of unlearning do not.
    """

    both: tuple[str, ...] = ()
    tuning: tuple[str, ...] = ()


def _adaptive(name: str) -> Case:
    return Case(both=(f"strategy={name}",), tuning=("strategy.server_lr=1e-2",))


CASES: Mapping[str, Case] = {
    "fedavg": Case(),
    "fedprox": Case(both=("strategy=fedprox",)),
    "fedavgm": Case(both=("strategy=fedavgm",)),
    **{name: _adaptive(name) for name in ("fedadagrad", "fedadam", "fedyogi")},
    **{
        name: Case(both=(f"aggregation={name}",))
        for name in ("ffa", "rolora", "flora", "fedex", "flexlora", "fedsvd", "fedrot", "hetlora")
    },
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; pairs are (fine-tuned, unlearned)."""

    said: str
    forget: tuple[float | None, float | None]
    utility: tuple[float | None, float | None]
    error: tuple[float, float]
    down: float
    up: float


def run_case(demo: Demo, name: str, case: Case, oracle_log: str) -> Row:
    """Fine-tunes, unlearns and evaluates with one choice of the server."""
    tuned = demo.train(f"{name}-tuned", "train-lora.yaml", "experiment=finetune/tofu/pocket", *case.both, *case.tuning)
    unlearned = demo.train(
        f"{name}-unlearned", "unlearn-lora.yaml", "experiment=unlearn/tofu/pocket", NAMED + str(tuned), *case.both
    )
    for folder in (tuned, unlearned):
        demo.evaluate(folder.name, NAMED + str(folder), oracle_log)
    lines = [read_history(folder) for folder in (tuned, unlearned)]
    clients = [client for line in (*lines[0], *lines[1]) for client in line["clients"] if client["num_steps"]]
    return Row(
        said=_said(case),
        forget=tuple(demo.metrics[folder.name]["forget_Q_A_Prob"] for folder in (tuned, unlearned)),
        utility=tuple(demo.metrics[folder.name]["model_utility"] for folder in (tuned, unlearned)),
        error=tuple(max(line["aggregation_error"] for line in run) for run in lines),
        down=sum(client["bytes_down"] + client["bytes_down_reference"] for client in clients) / len(clients),
        up=sum(client["bytes_up"] for client in clients) / len(clients),
    )


def _said(case: Case) -> str:
    """The overrides as the table shows them."""
    tuning = f" (fine-tuning: {' '.join(case.tuning)})" if case.tuning else ""
    return (" ".join(case.both) or "strategy=fedavg aggregation=fedit") + tuning


def table_of(rows: Sequence[Row], oracle: Mapping[str, float | None]) -> str:
    """The Markdown table."""
    head = "| server | forget Prob, fine-tuned → unlearned | model utility, fine-tuned → unlearned | aggregation error, fine-tuning / unlearning | kB down | kB up |"
    lines = [head, "|---|---|---|---|---|---|"]
    for row in rows:
        cells = (
            f"`{row.said}`",
            f"{row.forget[0]:.3f} → {row.forget[1]:.3f}",
            f"{row.utility[0]:.3f} → {row.utility[1]:.3f}",
            f"{row.error[0]:.2g} / {row.error[1]:.2g}",
            f"{row.down / 1000:.0f}",
            f"{row.up / 1000:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    told = f"oracle (FedAvg, FedIT): forget Prob {oracle['forget_Q_A_Prob']:.3f}, model utility {oracle['model_utility']:.3f}"
    return "\n".join([*lines, "", told])


def main() -> None:
    """Runs the cases and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=sorted(CASES), default=sorted(CASES, key=list(CASES).index))
    parser.add_argument("--saves", type=Path, default=Path("saves/strategies"))
    given = parser.parse_args()
    set_logging()
    demo = Demo(seed=given.seed, configs=CONFIGS, saves=given.saves, pocket_dir=Path("saves/pocket"))
    oracle = demo.train("oracle", "train-lora.yaml", "experiment=retrain/tofu/pocket")
    oracle_log = f"retain_logs_path={demo.evaluate('oracle', NAMED + str(oracle)) / EVAL_FILE}"
    rows = [run_case(demo, name, CASES[name], oracle_log) for name in given.only]
    print(table_of(rows, demo.metrics["oracle"]))


if __name__ == "__main__":
    main()
