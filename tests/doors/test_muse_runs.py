"""MUSE through the doors on a small folder: fine-tuning, the oracle, unlearning and evaluations, and what is refused before anything is written."""

import json

import pytest
from helpers_muse import muse_rows, write_muse
from helpers_runs import CONFIGS, history

from fedunlearn.data.muse import load_muse
from fedunlearn.data.opened import open_benchmark
from fedunlearn.doors.compose import compose
from fedunlearn.doors.evaluation import run_evaluation
from fedunlearn.doors.prepare import prepare
from fedunlearn.doors.stages import run_central, run_federated
from fedunlearn.errors import UserError
from fedunlearn.federation.site import Site

CHUNK = 24
SMALL = (
    "trainer.federated.num_clients=3", "trainer.federated.num_rounds=2", "trainer.args.per_device_train_batch_size=2",
    "trainer.args.gradient_accumulation_steps=1", "trainer.args.gradient_checkpointing=false", f"data.max_length={CHUNK}", "launcher.threads=1", "eval.at_end=false",
)  # fmt: skip
NAMES = {
    "finetune": "train-lora.yaml",
    "retrain": "train-lora.yaml",
    "unlearn": "unlearn-lora.yaml",
    "replay": "unlearn-lora.yaml",
    "eval": "eval.yaml",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_muse(tmp_path_factory.mktemp("muse"))


@pytest.fixture
def composed(pocket, saves, folder):
    """Composes experiment={kind}/muse/default for the folder and the tiny pocket's base."""

    def make(kind, task, *overrides, start=pocket.model):
        places = (
            "model=pocket-llama-lora", f"muse_path={folder}", f"model.model_args.pretrained_model_name_or_path={start}", f"paths.saves_dir={saves}",
            f"paths.cache_dir={saves}/cache", f"paths.pocket_dir={saves}/pocket", f"task_name={task}", "model.model_args.lora_config.r=4", "eval.max_new_tokens=2",
        )  # fmt: skip
        own = ("max_length=400",) if kind == "eval" else SMALL
        return compose(CONFIGS, NAMES[kind], [f"experiment={kind}/muse/default", *places, *own, *overrides])

    return make


@pytest.fixture
def train(composed, saves):
    """Trains, and gives the run's folder."""

    def run(kind, task, *overrides, **more):
        run_federated(composed(kind, task, *overrides, **more))
        return saves / ("unlearn" if kind in ("unlearn", "replay") else "finetune") / task

    return run


def loaded(path):
    return json.loads(path.read_text())


class TestRuns:
    def test_from_fine_tuning_to_an_evaluation_against_the_oracle(self, train, composed, saves):
        tuned = train("finetune", "ft")
        oracle = train("retrain", "oracle", f"partition.path={tuned}")
        run_evaluation(composed("eval", "of_oracle", start=oracle))
        log = saves / "eval" / "of_oracle"
        gone = train(
            "unlearn",
            "un",
            "method=npo",
            f"retain_logs_path={log}",
            "eval.at_end=true",
            "data.max_length=400",
            start=tuned,
        )
        summary = loaded(gone / "MUSE_SUMMARY.json")
        assert set(summary) == {
            "exact_memorization", "extraction_strength", "forget_knowmem_ROUGE", "forget_verbmem_ROUGE", "mia_min_k", "privleak", "retain_knowmem_ROUGE",
        }  # fmt: skip
        assert not (gone / "TOFU_EVAL.json").exists()
        found = loaded(gone / "MUSE_EVAL.json")
        assert found["provenance"]["retain_log"]
        a, b = (1 - body["mia_min_k"]["agg_value"] for body in (found, loaded(log / "MUSE_EVAL.json")))
        assert found["privleak"]["agg_value"] == pytest.approx(100 * (a - b) / b)
        assert {client["role"] for line in history(gone) for client in line["clients"]} == {"unlearn"}

    def test_article_i_belongs_to_client_i_mod_k_from_fine_tuning_on(self, train):
        tuned = train("finetune", "ft", "trainer.federated.num_rounds=1")
        assert loaded(tuned / "partition.json")["clients"] == [list(range(k, 13, 3)) for k in range(3)]
        gone = train("unlearn", "un", "method=grad_diff", "trainer.federated.num_rounds=1", start=tuned)
        assert loaded(gone / "partition.json")["hash"] == loaded(tuned / "partition.json")["hash"]
        assert loaded(gone / "request.json")["rows"] == [0, 1, 2, 3, 4]

    def test_what_counts_is_chunks_not_articles(self, train, composed, folder):
        """Each client declares, and is weighed by, as many examples as its articles of either kind fill."""
        tuned = train("finetune", "ft", "trainer.federated.num_rounds=1")
        site, muse = Site(composed("finetune", "ft", "trainer.federated.num_rounds=1").run), load_muse(str(folder))
        chat = site.made.chat
        for client, line in enumerate(history(tuned)[0]["clients"]):
            owned = loaded(tuned / "partition.json")["clients"][client]
            text = {n: muse.texts("raw", "forget")[n] if n < 5 else muse.texts("raw", "retain1")[n - 5] for n in owned}
            sides = ("\n\n".join(text[n] for n in owned if (n < 5) is first) for first in (True, False))
            want = sum(-(-len(chat.text(side, special=False)) // CHUNK) for side in sides)
            assert want > len(owned)
            assert (line["num_examples"], line["num_trained"]) == (want, want)

    def test_the_oracle_trains_on_fine_tuning_s_chunks_but_for_those_to_be_forgotten(self, train, composed):
        tuned = train("finetune", "ft", "trainer.federated.num_rounds=1")
        train("retrain", "oracle", f"partition.path={tuned}", "trainer.federated.num_rounds=1")
        sites = [
            Site(composed("finetune", "ft", "trainer.federated.num_rounds=1").run),
            Site(composed("retrain", "oracle", f"partition.path={tuned}", "trainer.federated.num_rounds=1").run),
        ]
        for client in range(3):
            full, rest = (site.encode(site.owned[client].retain) for site in sites)
            forget = sites[0].encode(tuple(n for n in sites[0].owned[client].retain if n < 5))
            assert full == (*forget, *rest)
            assert forget

    def test_fine_tuning_replayed_without_the_articles_is_the_oracle(self, train):
        """Rollback goes back behind round 1: the oracle's rounds bit by bit, weights counted in chunks of what is left."""
        kept = ("ledger.enabled=true", "trainer.federated.keep_rounds=all")
        tuned = train("finetune", "ft", *kept)
        oracle = train("retrain", "oracle", f"partition.path={tuned}")
        gone = train("replay", "un", "method=rollback", start=tuned)
        weights = [
            [(c["client_id"], c["num_examples"], c["weight"]) for c in history(run)[-1]["clients"]]
            for run in (oracle, gone)
        ]
        assert weights[0] == weights[1]
        assert history(gone)[-1]["adapter_hash"] == history(oracle)[-1]["adapter_hash"]

    def test_rounds_are_evaluated_on_a_few_drawn_rows(self, train):
        tuned = train("finetune", "ft", "eval.every_n_rounds=2", "eval.round_rows=2", "data.max_length=400")
        first, second = history(tuned)
        assert not first["evaluation"]
        assert set(second["evaluation"]) == {"forget_verbmem_ROUGE", "extraction_strength"}

    def test_the_central_baseline_counts_chunks_too(self, composed, saves):
        run_central(composed("finetune", "central"))
        line = history(saves / "finetune" / "central")[0]["clients"][0]
        assert line["num_examples"] == line["num_trained"] > 13

    def test_the_same_seed_twice_is_the_same_adapter(self, train):
        runs = [train("finetune", name, "trainer.federated.num_rounds=1") for name in ("one", "two")]
        first, second = ((run / "adapter" / "adapter_model.safetensors").read_bytes() for run in runs)
        assert first == second

    @pytest.mark.parametrize("method", ["grad_ascent", "simnpo", "rmu", "undial"])
    def test_other_losses_work_on_chunks(self, train, method):
        layer = ("method.layer=0",) if method == "rmu" else ()
        gone = train(
            "unlearn", "un", f"method={method}", "trainer.federated.num_rounds=1", "partition=round_robin", *layer
        )
        assert (gone / "done.json").is_file()


class TestRefused:
    @pytest.mark.parametrize(
        ("kind", "overrides", "message"),
        [
            (
                "finetune",
                ("tofu_path=x",),
                r"tofu_path='x' beside muse_path='.*': a run is on one benchmark; name one, and set the other to null",
            ),
            ("finetune", ("muse_path=null",), r"tofu_path=None beside muse_path=None: a run is on one benchmark"),
            (
                "finetune",
                ("eval=tofu",),
                r"eval.name='tofu' beside muse_path='.*': the evaluation must be that of the data; choose eval=muse",
            ),
            ("unlearn", ("requests=[{rows: [1]}]",), r"requests are given beside muse_path: .*leave requests null"),
            (
                "unlearn",
                ("method=altpo",),
                r"method AltPO beside muse_path: it needs other answers .*choose another method",
            ),
            ("unlearn", ("method=idk_dpo", "data.idk_path=builtin"), r"method IdkDPO beside muse_path"),
            (
                "unlearn",
                ("protocol=all_clients", "protocol.released=true"),
                r"protocol AllClients beside muse_path: .*choose in_round",
            ),
            (
                "eval",
                ("eval.question_key=paraphrased_question",),
                r"eval.question_key='paraphrased_question' beside muse_path",
            ),
            ("eval", ("eval.holdout_split=holdout10",), r"eval.holdout_split='holdout10' beside muse_path"),
        ],
    )
    def test_while_the_config_is_read(self, composed, kind, overrides, message):
        with pytest.raises(UserError, match=message):
            composed(kind, "x", *overrides)

    @pytest.mark.parametrize(
        ("left_out", "overrides", "message"),
        [
            ("raw/retain1", (), r"no split 'retain1' in its subset 'raw'"),
            ("privleak/holdout", ("eval.at_end=true",), r"no split 'holdout' in its subset 'privleak'"),
            (None, ("trainer.federated.num_clients=14",), r"num_clients=14 exceeds the 13 articles of .* \(an article is never split\)"),
            (None, ("forget_split=forget10",), r"forget_split='forget10' .*MUSE's pair is forget_split=forget"),
            (None, ("muse_path=./nowhere",), r"muse_path='./nowhere' is no folder"),
        ],
    )  # fmt: skip
    def test_before_anything_is_written(self, composed, saves, tmp_path, left_out, overrides, message):
        rows = {name: split for name, split in muse_rows().items() if name != left_out}
        other = write_muse(tmp_path / "other", rows)
        with pytest.raises(UserError, match=message):
            prepare(composed("finetune", "ft", f"muse_path={other}", *overrides))
        assert not saves.exists()

    def test_a_passage_that_does_not_fit_leaves_no_evaluation_behind(self, composed, saves, tmp_path):
        rows = {**muse_rows(), "verbmem/forget": [{"prompt": "word " * 500, "gt": "y"}]}
        with pytest.raises(
            UserError, match=r"verbmem/forget row 0 has a prompt of \d+ tokens, more than max_length=400"
        ):
            run_evaluation(composed("eval", "ev", f"muse_path={write_muse(tmp_path / 'long', rows)}"))
        assert not (saves / "eval").exists()

    def test_a_log_of_tofu_s_file_name_is_not_looked_for(self, composed, tmp_path):
        with pytest.raises(
            UserError,
            match=r"retain_logs_path=.* there is no such file; give the MUSE_EVAL.json of an evaluation of the oracle",
        ):
            run_evaluation(composed("eval", "ev", f"retain_logs_path={tmp_path}"))


def test_the_config_names_the_benchmark(composed):
    assert open_benchmark(composed("eval", "x").run).key == "muse_path"
