"""Every metric of a whole evaluation against plain formulas, row by row: one forward a row, full logits, no batch, nothing shared."""

import math
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_eval import ATTACKS, evaluate_tofu, metrics_of, tiny_chat, tiny_llama, write_folder
from scipy.stats import hmean, ks_2samp

from fedunlearn.config.evaluation import EvalConfig
from fedunlearn.data.tofu import load_tofu
from fedunlearn.errors import UserError
from fedunlearn.evals.generation import decode
from fedunlearn.evals.gradnorm import gradient_norms
from fedunlearn.evals.scoring import score_rows
from fedunlearn.records.evaluation import Detail

SETTINGS = EvalConfig(
    max_new_tokens=4, metrics=metrics_of(*ATTACKS, "tofu_reference"), reference_model_path="another", batch_tokens=700
)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}


class Slow:
    """One row at a time."""

    def __init__(self, model, chat):
        self.model, self.chat = model.eval(), chat

    def row(self, question, answer):
        """Log-probabilities [T, V] at the labels, and the labels."""
        row = self.chat.encode(question, answer, "row")
        with torch.no_grad():
            logits = self.model(torch.tensor([row.input_ids])).logits[0]
        logits = logits[row.num_prompt - 1 : -1].double()
        return torch.log_softmax(logits, -1), torch.tensor(row.labels)

    def loss(self, question, answer):
        logp, labels = self.row(question, answer)
        return -float(logp[range(len(labels)), labels].mean())

    def min_k(self, question, answer, standardised):
        logp, labels = self.row(question, answer)
        values = logp[range(len(labels)), labels]
        if standardised:
            p = logp.exp()
            mu = (p * logp).sum(-1)
            values = (values - mu) / ((p * logp**2).sum(-1) - mu**2).clamp(min=1e-6).sqrt()
        values = sorted(values[:-1].tolist())
        return -float(np.mean(values[: max(1, int(len(values) * 0.4))]))

    def gradnorm(self, question, answer):
        row = self.chat.encode(question, answer, "row")
        logits = self.model(torch.tensor([row.input_ids])).logits[0, row.num_prompt - 1 : -2]
        self.model.zero_grad()
        torch.nn.functional.cross_entropy(logits, torch.tensor(row.labels[:-1])).backward()
        return float(np.mean([float(p.grad.double().norm()) for p in self.model.parameters() if p.grad is not None]))

    def hits(self, question, answer):
        logp, labels = self.row(question, answer)
        return (logp.argmax(-1) == labels)[:-1].tolist()

    def strength(self, question, answer):
        hits = self.hits(question, answer)
        first = next((k for k in range(len(hits)) if all(hits[k:])), len(hits) - 1)
        return 1 - first / len(hits)

    def ratio(self, row):
        right = self.loss(row.question, row.paraphrased_answer or row.answer)
        wrong = np.mean([self.loss(row.question, answer) for answer in row.perturbed_answers])
        return math.exp(right - wrong)


def area(forget, holdout):
    return float(np.mean([[(h > f) + 0.5 * (h == f) for h in holdout] for f in forget]))


def slowly(model, other, chat, tofu, found, retain):
    """Gives every metric but ROUGE, which the texts of `found` stand in for."""
    slow, reference = Slow(model, chat), Slow(other, chat)
    sets = {
        name: tofu.perturbed(split)
        for name, split in {"forget": "forget10", "retain": "retain", "ra": "real_authors", "wf": "world_facts"}.items()
    }
    wanted = {}
    for name, rows in sets.items():
        plain = [slow.loss(row.question, row.answer) for row in rows]
        wrong = [[slow.loss(row.question, answer) for answer in row.perturbed_answers] for row in rows]
        ratios = [slow.ratio(row) for row in rows]
        wanted[f"{name}_Q_A_Prob"] = np.mean(np.exp(np.negative(plain)))
        wanted[f"{name}_Q_A_PERT_Prob"] = np.mean(np.exp(np.negative(wrong)))
        if name in ("ra", "wf"):
            wanted[f"{name}_Q_A_Prob_normalised"] = np.mean(
                [
                    math.exp(-p) / (math.exp(-p) + sum(math.exp(-w) for w in ws))
                    for p, ws in zip(plain, wrong, strict=True)
                ]
            )
        else:
            wanted[f"{name}_Q_A_PARA_Prob"] = np.mean(
                [math.exp(-slow.loss(row.question, row.paraphrased_answer)) for row in rows]
            )
        if name == "forget":
            wanted["forget_truth_ratio"] = np.mean([min(r, 1 / r) for r in ratios])
            wanted["forget_quality"] = ks_2samp(ratios, retain.metrics["forget_truth_ratio"].column("score")).pvalue
        else:
            wanted[f"{name}_Truth_Ratio"] = np.mean([max(0, 1 - r) for r in ratios])
        wanted[f"{name}_Q_A_ROUGE"] = found[f"{name}_Q_A_ROUGE"].agg_value
    names = [f"{name}_Q_A_{kind}" for name in ("retain",) for kind in ("Prob", "ROUGE")] + ["retain_Truth_Ratio"]
    names += [f"{n}_{kind}" for n in ("ra", "wf") for kind in ("Q_A_Prob_normalised", "Q_A_ROUGE", "Truth_Ratio")]
    parts = [float(wanted[name]) for name in names]
    wanted["model_utility"] = hmean(parts) if min(parts) > 0 else 0.0
    forget, holdout = sets["forget"], tofu.rows("holdout10")
    wanted["extraction_strength"] = np.mean([slow.strength(row.question, row.answer) for row in forget])
    wanted["exact_memorization"] = np.mean([np.mean(slow.hits(row.question, row.answer)) for row in forget])
    attacks = {
        "mia_loss": lambda q, a: slow.loss(q, a),
        "mia_zlib": lambda q, a: (
            slow.loss(q, a) / len(zlib.compress(decode(chat, chat.encode(q, a, "row").labels).encode()))
        ),
        "mia_min_k": lambda q, a: slow.min_k(q, a, standardised=False),
        "mia_min_k_plus_plus": lambda q, a: slow.min_k(q, a, standardised=True),
        "mia_gradnorm": slow.gradnorm,
        "mia_reference": lambda q, a: slow.loss(q, a) - reference.loss(q, a),
    }
    sides = {}
    for name, attack in attacks.items():
        sides[name] = [[attack(row.question, row.answer) for row in rows] for rows in (forget, holdout)]
        wanted[name] = area(*sides[name])
    other_auc = retain.metrics["mia_min_k"].agg_value
    wanted["privleak"] = (
        None if other_auc == 1 else 100 * ((1 - wanted["mia_min_k"]) - (1 - other_auc)) / (1 - other_auc)
    )
    return wanted, sides


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_metric_is_the_plain_formula(tmp_path, dtype):
    tofu, chat = load_tofu(str(write_folder(tmp_path))), tiny_chat()
    model, other, third = (tiny_llama(seed).to(dtype) for seed in (0, 5, 6))
    reference = {
        name: tuple(scored(other, chat, rows))
        for name, rows in {"forget": tofu.perturbed("forget10"), "holdout": tofu.rows("holdout10")}.items()
    }
    settings = replace(SETTINGS)
    retain = evaluate_tofu(third, chat, tofu, "forget10", settings, None, {}, reference=reference)
    found = evaluate_tofu(model, chat, tofu, "forget10", settings, retain, {}, reference=reference).metrics
    wanted, sides = slowly(model, other, chat, tofu, found, retain)
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        expected = None if value is None else pytest.approx(float(value), abs=TOLERANCE[dtype], rel=TOLERANCE[dtype])
        assert found[name].agg_value == expected, name
    for name, both in sides.items():
        for side, scores in zip(("forget", "holdout"), both, strict=True):
            expected = pytest.approx(scores, abs=TOLERANCE[dtype], rel=TOLERANCE[dtype])
            assert found[name].parts[side].column("score") == expected, name


def test_a_gradient_that_is_not_finite_names_its_row():
    chat, model = tiny_chat(), tiny_llama()
    rows = [chat.encode("Who?", answer, "row") for answer in ("Ann Lee.", "Bob Ray.")]
    with torch.no_grad():
        model.model.embed_tokens.weight[rows[1].input_ids[rows[1].num_prompt]] = float("nan")
    with pytest.raises(UserError, match=r"forget10 row 7: its gradient is not finite"):
        gradient_norms(model, rows, "model", {rows[0]: "forget10 row 6", rows[1]: "forget10 row 7"})


def scored(model, chat, rows):
    encoded = [chat.encode(row.question, row.answer, "row") for row in rows]
    scores = score_rows(model, dict.fromkeys(encoded, Detail.LOSS), pad_id=0, batch_tokens=512)
    return [scores[row] for row in encoded]
