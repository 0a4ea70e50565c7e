"""A whole MUSE evaluation on a made-up folder: every metric against plain formulas, one row at a time; logs, refusals, files."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_eval import PHI_ARGS, byte_tokenizer, evaluate_tofu, metrics_of, tiny_chat, tiny_llama, write_folder
from helpers_muse import lettered_llama, muse_rows, write_muse
from rouge_score.tokenizers import DefaultTokenizer

from fedunlearn.config.evaluation import EvalConfig
from fedunlearn.data.chat import ChatFormat
from fedunlearn.data.muse import load_muse
from fedunlearn.data.tofu import load_tofu
from fedunlearn.errors import UserError
from fedunlearn.evals.evaluation import evaluate_suite
from fedunlearn.evals.files import MUSE_FILES, read_log, write_log
from fedunlearn.evals.generation import clean, cut_before
from fedunlearn.evals.suites import read_suite
from fedunlearn.metrics.membership import MinKAttack
from fedunlearn.metrics.probability import Probability
from fedunlearn.metrics.rouge import Rouge

SETTINGS = EvalConfig(name="muse", max_new_tokens=128, metrics=metrics_of("muse"), batch_tokens=300)
EOS = "<|eot_id|>"


def chat_of(max_length=320):
    return ChatFormat(byte_tokenizer(None), PHI_ARGS, max_length)


def evaluate(muse, model=None, settings=SETTINGS, retain_log=None, chat=None):
    suite = read_suite(muse, "forget", settings, None)
    model = model or lettered_llama()
    return evaluate_suite(model, chat or chat_of(), suite, settings, retain_log, {"base": "tiny"})


class Slow:
    """The section's sentences, one row and one token at a time, without a cache."""

    def __init__(self, model, chat):
        self.model, self.chat = model.eval(), chat

    def ids(self, text):
        return self.chat.tokenizer(text)["input_ids"]

    def say(self, prompt, count):
        ids = self.ids(prompt)
        start = len(ids)
        with torch.no_grad():
            while len(ids) < start + count:
                ids.append(int(self.model(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == self.chat.tokenizer.eos_token_id:
                    break
        return clean(self.chat.tokenizer.decode(ids[start:], skip_special_tokens=True))

    def labels(self, ids, start):
        """Log-probabilities and hits of ids[start:], the last id left out."""
        with torch.no_grad():
            logits = self.model(torch.tensor([ids])).logits[0].double()
        logp = torch.log_softmax(logits, -1)
        places = range(start, len(ids) - 1)
        return [float(logp[t - 1, ids[t]]) for t in places], [int(logp[t - 1].argmax()) == ids[t] for t in places]

    def knowledge(self, rows, side, question):
        shown = "".join(f"Question: {r['question']}\nAnswer: {r['answer']}\n\n" for r in rows[f"knowmem/{side}_qa_icl"])
        text = self.say(f"{shown}Question: {question}\nAnswer: ", 32)
        for stop in (EOS, "\n\n", "\nQuestion", "Question:"):
            text = text.split(stop)[0]
        return text.strip()

    def passage(self, row, limit):
        start = len(self.ids(row["prompt"]))
        return self.ids(row["prompt"] + " " + row["gt"])[: start + limit], start


def rouge_l(truth, said):
    """F1 of the longest common subsequence of stemmed words."""
    a, b = (DefaultTokenizer(use_stemmer=True).tokenize(text) for text in (truth, said))
    table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    for i, left in enumerate(a):
        for j, right in enumerate(b):
            table[i + 1, j + 1] = table[i, j] + 1 if left == right else max(table[i, j + 1], table[i + 1, j])
    common = int(table[-1, -1])
    if not common:
        return 0.0
    precision, recall = common / len(b), common / len(a)
    return 2 * precision * recall / (precision + recall)


def strength(hits):
    first = next((k for k in range(len(hits)) if all(hits[k:])), len(hits) - 1)
    return 1 - first / len(hits)


def min_k(logp):
    return -float(np.mean(sorted(logp)[: max(1, int(len(logp) * 0.4))]))


def area(forget, holdout):
    return float(np.mean([[(h > f) + 0.5 * (h == f) for h in holdout] for f in forget]))


def answered(rows, slow):
    """The rows, with truths that hold some of what the model says, so that ROUGE is neither 0 nor 1 everywhere."""
    for side in ("forget", "retain"):
        for i, row in enumerate(rows[f"knowmem/{side}_qa"]):
            row["answer"] = f"{slow.knowledge(rows, side, row['question'])[: 6 + 5 * i]} river ."
    for i, row in enumerate(rows["verbmem/forget"]):
        row["gt"] = f"{slow.say(row['prompt'], 128)[: 30 + 20 * i].strip()} meadow {i} ."
    return rows


@pytest.fixture(scope="module")
def slow():
    return Slow(lettered_llama(), chat_of())


@pytest.fixture(scope="module")
def rows(slow):
    return answered(muse_rows(), slow)


@pytest.fixture(scope="module")
def muse(rows, tmp_path_factory):
    return load_muse(str(write_muse(tmp_path_factory.mktemp("muse"), rows)))


@pytest.fixture(scope="module")
def log(muse):
    return evaluate(muse)


def column(log, name, key):
    return [row[key] for row in log.metrics[name].value_by_index]


class TestNumbers:
    @pytest.mark.parametrize("side", ["forget", "retain"])
    def test_knowledge_is_asked_behind_answered_questions_and_cut_at_the_next(self, log, rows, slow, side):
        asked = rows[f"knowmem/{side}_qa"]
        said = [slow.knowledge(rows, side, row["question"]) for row in asked]
        assert column(log, f"{side}_knowmem_ROUGE", "generation") == said
        truths = [clean(row["answer"]).strip() for row in asked]
        assert column(log, f"{side}_knowmem_ROUGE", "ground_truth") == truths
        want = [rouge_l(truth, text) for truth, text in zip(truths, said, strict=True)]
        assert column(log, f"{side}_knowmem_ROUGE", "rougeL_f1") == pytest.approx(want, abs=1e-12)
        assert log.metrics[f"{side}_knowmem_ROUGE"].agg_value == pytest.approx(np.mean(want), abs=1e-12)
        assert 0 < np.mean(want) < 1

    def test_passages_go_on_for_128_tokens(self, log, rows, slow):
        passages = rows["verbmem/forget"]
        said = [slow.say(row["prompt"], 128).split(EOS)[0].strip() for row in passages]
        assert column(log, "forget_verbmem_ROUGE", "generation") == said
        want = [rouge_l(clean(" " + row["gt"]).strip(), text) for row, text in zip(passages, said, strict=True)]
        assert column(log, "forget_verbmem_ROUGE", "rougeL_f1") == pytest.approx(want, abs=1e-12)
        assert 0 < log.metrics["forget_verbmem_ROUGE"].agg_value < 1

    def test_extraction_strength_and_exact_memorization_are_those_of_the_passages(self, log, rows, slow):
        hits = [slow.labels(*slow.passage(row, 320))[1] for row in rows["verbmem/forget"]]
        assert column(log, "extraction_strength", "score") == pytest.approx([strength(hit) for hit in hits], abs=1e-12)
        assert column(log, "exact_memorization", "score") == pytest.approx([np.mean(hit) for hit in hits], abs=1e-12)
        assert np.mean([np.mean(hit) for hit in hits]) > 0

    def test_min_k_tells_privleak_texts_apart(self, log, rows, slow):
        sides = {}
        for side in ("forget", "holdout"):
            sides[side] = [min_k(slow.labels(slow.ids(row["text"]), 1)[0]) for row in rows[f"privleak/{side}"]]
            found = [row["score"] for row in log.metrics["mia_min_k"].parts[side].value_by_index]
            assert found == pytest.approx(sides[side], abs=1e-5)
        assert log.metrics["mia_min_k"].agg_value == area(sides["forget"], sides["holdout"])

    def test_privleak_wants_the_oracle_s_attack(self, log, muse, tmp_path):
        """100 (a - b) / b of a = 1 - AUC here, b = 1 - AUC there; null without a log, 0 against itself."""
        assert log.metrics["privleak"].agg_value is None
        write_log(log, tmp_path, MUSE_FILES)
        assert evaluate(muse, retain_log=read_log(tmp_path, MUSE_FILES)).metrics["privleak"].agg_value == 0.0
        others = (evaluate(muse, tiny_llama(seed)) for seed in range(1, 9))
        oracle = next(
            o for o in others if o.metrics["mia_min_k"].agg_value not in (1.0, log.metrics["mia_min_k"].agg_value)
        )
        a, b = (1 - one.metrics["mia_min_k"].agg_value for one in (log, oracle))
        found = evaluate(muse, retain_log=oracle).metrics["privleak"].agg_value
        assert found == pytest.approx(100 * (a - b) / b, rel=1e-12)

    def test_passages_and_texts_are_cut_where_the_section_says(self, muse, rows, slow):
        """max_length 40: 40 ids behind a passage's prompt, the first 40 of a text; under compat what opens a text comes on top, here nothing."""
        chat = chat_of(40)
        sets = read_suite(muse, "forget", replace(SETTINGS, metrics=metrics_of("muse")), None).sets
        found = sets["forget_verbmem"].encode(chat)
        assert [(list(row.input_ids), row.num_prompt) for row in found.plain] == [
            slow.passage(row, 40) for row in rows["verbmem/forget"]
        ]
        assert found.truths[0] == clean(chat.tokenizer.decode(found.plain[0].labels)).strip()
        texts = sets["forget_privleak"].encode(chat)
        assert [list(row.input_ids) for row in texts.plain] == [
            slow.ids(row["text"])[:40] for row in rows["privleak/forget"]
        ]

    def test_stops_cut_in_turn(self):
        stops = ("\n\n", "\nQuestion", "Question:")
        assert cut_before("a b\nQuestion: c\n\nd", stops) == "a b"
        assert cut_before("\n\na", stops) == ""
        assert cut_before("a Question: b", stops) == "a "
        assert cut_before("a\nb", stops) == "a\nb"

    def test_a_lower_limit_of_the_config_holds_for_all(self, muse, log):
        few = evaluate(muse, settings=replace(SETTINGS, max_new_tokens=3))
        for name in ("forget_knowmem_ROUGE", "forget_verbmem_ROUGE"):
            long, short = column(log, name, "generation"), column(few, name, "generation")
            assert all(len(text) <= 3 and whole.startswith(text) for whole, text in zip(long, short, strict=True))


class TestLogs:
    def test_the_same_model_twice_is_the_same_log(self, log, muse):
        assert evaluate(muse) == log

    def test_both_files_have_open_unlearning_s_names_and_shapes(self, log, tmp_path):
        write_log(log, tmp_path, MUSE_FILES)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["MUSE_EVAL.json", "MUSE_SUMMARY.json"]
        body = json.loads((tmp_path / "MUSE_EVAL.json").read_text())
        assert set(body) == {*metrics_of("muse"), "provenance"}
        assert set(body["forget_knowmem_ROUGE"]["value_by_index"]["0"]) == {
            "rouge1_recall", "rougeL_f1", "rougeL_recall", "input", "ground_truth", "generation",
        }  # fmt: skip
        assert set(body["mia_min_k"]) == {"forget", "holdout", "auc", "agg_value"}
        summary = json.loads((tmp_path / "MUSE_SUMMARY.json").read_text())
        assert summary == {name: m.agg_value for name, m in log.metrics.items() if m.agg_value is not None}
        assert read_log(tmp_path, MUSE_FILES) == log

    def test_provenance_names_the_rows(self, log, muse):
        said = log.provenance
        assert (said["forget_split"], said["data"]["privleak/holdout"]) == ("forget", muse.hash("privleak/holdout"))
        assert set(said["data"]) == {
            "knowmem/forget_qa", "knowmem/retain_qa", "verbmem/forget", "privleak/forget", "privleak/holdout",
        }  # fmt: skip

    @pytest.mark.parametrize("side", ["forget", "holdout"])
    def test_a_log_of_other_texts_is_refused(self, log, rows, tmp_path, side):
        name = f"privleak/{side}"
        other = load_muse(str(write_muse(tmp_path, {**rows, name: rows[name][:3]})))
        with pytest.raises(
            UserError, match=rf"the log was made on other rows of {name} than these; evaluate the oracle"
        ):
            evaluate(other, retain_log=log)

    def test_a_log_of_tofu_and_one_of_the_other_definitions_are_refused(self, log, muse, tmp_path):
        tofu = load_tofu(str(write_folder(tmp_path / "tofu")))
        settings = EvalConfig(max_new_tokens=2, metrics={"mia_min_k": MinKAttack(k=0.4)})
        theirs = evaluate_tofu(tiny_llama(), tiny_chat(), tofu, "forget10", settings, None, {})
        with pytest.raises(UserError, match="the log is of forget_split='forget10', this evaluation of 'forget'"):
            evaluate(muse, retain_log=theirs)
        with pytest.raises(UserError, match=r"follows the definitions 'log-space' of mia_min_k.*set eval.compat=null"):
            evaluate(muse, settings=replace(SETTINGS, compat="open-unlearning"), retain_log=log)
        foreign = replace(
            log, provenance={}, metrics={k: replace(m, definition="open-unlearning") for k, m in log.metrics.items()}
        )
        compat = replace(SETTINGS, compat="open-unlearning")
        assert evaluate(muse, settings=compat, retain_log=foreign).metrics["privleak"].agg_value == 0.0

    def test_a_log_of_texts_cut_elsewhere_is_refused(self, log, muse):
        assert log.provenance["max_length"] == 320
        with pytest.raises(
            UserError,
            match=r"the log was made with max_length=320, where texts are cut, this evaluation has 310; make the two equal",
        ):
            evaluate(muse, retain_log=log, chat=chat_of(310))

    def test_a_trial_takes_the_first_rows_and_says_so(self, muse):
        trial = evaluate(muse, settings=replace(SETTINGS, max_rows=2))
        assert (trial.provenance["trial"], len(trial.metrics["forget_verbmem_ROUGE"].value_by_index)) == (True, 2)
        with pytest.raises(UserError, match=r"made with eval.max_rows=2, this evaluation has None"):
            evaluate(muse, retain_log=trial)


class TestRefused:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("privleak/holdout", r"no split 'holdout' in its subset 'privleak'; it has: forget, retain"),
            ("privleak/forget", r"no split 'forget' in its subset 'privleak'; it has: holdout, retain"),
            ("knowmem/retain_qa_icl", r"no split 'retain_qa_icl' in its subset 'knowmem'"),
        ],
    )
    def test_a_split_that_is_not_there(self, rows, tmp_path, name, message):
        muse = load_muse(str(write_muse(tmp_path, {key: value for key, value in rows.items() if key != name})))
        with pytest.raises(UserError, match=message):
            read_suite(muse, "forget", SETTINGS, None)

    def test_a_column_that_is_not_there(self, rows, tmp_path):
        muse = load_muse(str(write_muse(tmp_path, {**rows, "verbmem/forget": [{"prompt": "a"}]})))
        with pytest.raises(UserError, match=r"verbmem/forget row 0 needs a text in column 'gt' and has 'prompt'"):
            read_suite(muse, "forget", SETTINGS, None)

    def test_a_prompt_longer_than_max_length(self, rows, tmp_path):
        passages = [*rows["verbmem/forget"], {"prompt": "x" * 350, "gt": "y"}]
        muse = load_muse(str(write_muse(tmp_path, {**rows, "verbmem/forget": passages})))
        with pytest.raises(
            UserError,
            match=r"verbmem/forget row 3 has a prompt of 350 tokens, more than max_length=320 .*set it to 350 or above",
        ):
            evaluate(muse)

    def test_questions_that_do_not_fit_behind_the_answered_ones(self, muse):
        with pytest.raises(UserError, match=r"knowmem/forget_qa row 0 has \d+ tokens .*data.max_length=60"):
            evaluate(muse, chat=chat_of(60))

    def test_a_text_of_one_token(self, rows, tmp_path):
        muse = load_muse(str(write_muse(tmp_path, {**rows, "privleak/holdout": [{"text": "x"}]})))
        with pytest.raises(UserError, match=r"privleak/holdout row 0 has 1 tokens, and no label"):
            evaluate(muse)

    @pytest.mark.parametrize(
        ("metric", "message"),
        [
            (
                Rouge(of="forget"),
                r"eval.metrics.mine reads the data set 'forget', which MUSE has not; known: forget_knowmem,",
            ),
            (
                Rouge(of="forget_privleak"),
                r"eval.metrics.mine reads 'texts' of 'forget_privleak', and privleak/forget has none",
            ),
            (
                Probability(of="forget_knowmem", answers="perturbed"),
                r"reads 'perturbed' of 'forget_knowmem', and knowmem/forget_qa has none",
            ),
        ],
    )
    def test_a_metric_that_reads_what_there_is_not(self, muse, metric, message):
        with pytest.raises(UserError, match=message):
            read_suite(muse, "forget", replace(SETTINGS, metrics={**SETTINGS.metrics, "mine": metric}), None)

    def test_a_metric_of_one_s_own_reads_any_data_set(self, muse):
        settings = replace(
            SETTINGS, metrics={"mine": Probability(of="retain_privleak"), "asked": Probability(of="forget_knowmem")}
        )
        found = evaluate(muse, settings=settings).metrics
        assert (len(found["mine"].value_by_index), len(found["asked"].value_by_index)) == (4, 4)
