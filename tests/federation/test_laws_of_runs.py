"""Laws that hold for whole runs, bit by bit."""

import gc

import pytest
import torch
from helpers_runs import adapter_bytes, adapter_tensors, central, finetune, history, unlearn
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedunlearn.doors import measure
from fedunlearn.federation import rounds, site
from fedunlearn.models.resident import release


@pytest.fixture(scope="module")
def tuned(pocket, tmp_path_factory):
    """One fine-tuning run that several tests start from."""
    return finetune(pocket, tmp_path_factory.mktemp("tuned"))


def test_one_client_and_one_round_equal_central_training(pocket, saves):
    one = ("trainer.federated.num_clients=1", "trainer.federated.num_rounds=1", "partition=by_author")
    federated = finetune(pocket, saves, "fed", *one)
    alone = central(pocket, saves, "finetune", "central", *one)
    assert adapter_bytes(federated) == adapter_bytes(alone)


def test_the_same_seed_gives_the_same_file_and_another_seed_another(pocket, saves):
    first, second = finetune(pocket, saves, "a"), finetune(pocket, saves, "b")
    other = finetune(pocket, saves, "c", "trainer.args.seed=1")
    assert adapter_bytes(first) == adapter_bytes(second)
    assert adapter_bytes(first) != adapter_bytes(other)


def test_evaluation_on_or_off_gives_the_same_adapter(pocket, saves, tuned):
    quiet = unlearn(pocket, saves, tuned, "quiet")
    judged = unlearn(pocket, saves, tuned, "judged", "eval.at_end=true", "eval.max_rows=2", "eval.max_new_tokens=4")
    assert (judged / "TOFU_EVAL.json").is_file()
    assert adapter_bytes(quiet) == adapter_bytes(judged)


def test_fedprox_with_mu_0_is_fedavg_and_with_mu_it_is_not(pocket, saves, tuned):
    plain = unlearn(pocket, saves, tuned, "avg")
    zero = unlearn(pocket, saves, tuned, "zero", "strategy=fedprox", "strategy.mu=0")
    some = unlearn(pocket, saves, tuned, "some", "strategy=fedprox", "strategy.mu=10")
    assert adapter_bytes(plain) == adapter_bytes(zero)
    assert adapter_bytes(plain) != adapter_bytes(some)


def test_two_fine_tuned_adapters_give_two_unlearned_ones(pocket, saves, tuned):
    """The fault of the field: an adapter that is wrapped anew and zeroed makes both results equal."""
    other = finetune(pocket, saves, "other", "trainer.args.seed=5")
    first, second = unlearn(pocket, saves, tuned, "u1"), unlearn(pocket, saves, other, "u2")
    assert adapter_bytes(first) != adapter_bytes(second)


def test_with_learning_rate_0_the_unlearned_adapter_is_the_fine_tuned_one(pocket, saves, tuned):
    still = unlearn(pocket, saves, tuned, "still", "trainer.args.learning_rate=0")
    before, after = adapter_tensors(tuned), adapter_tensors(still)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("retain", ["nll", "kl"])
def test_resume_ends_bit_equal(pocket, saves, tuned, retain, monkeypatch):
    method = (f"method.retain={retain}", "trainer.federated.num_rounds=3")
    whole = unlearn(pocket, saves, tuned, "whole", *method)
    real = rounds.save_checkpoint

    def stop_after_one(folder, checkpoint, *rest):
        real(folder, checkpoint, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(rounds, "save_checkpoint", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        unlearn(pocket, saves, tuned, "stopped", *method)
    monkeypatch.setattr(rounds, "save_checkpoint", real)
    resumed = unlearn(pocket, saves, tuned, "stopped", *method, "resume=true")
    assert adapter_bytes(whole) == adapter_bytes(resumed)
    assert [line["round"] for line in history(resumed)] == [1, 2, 3]


def test_bytes_on_the_wire_stay_within_the_bound(pocket, saves, tuned):
    run = unlearn(pocket, saves, tuned, "bytes")
    tensors = adapter_tensors(run)
    bound = 1.01 * sum(t.numel() * 4 for t in tensors.values()) + 160 * len(tensors) + 1000
    lines = [client for line in history(run) for client in line["clients"]]
    assert lines
    assert all(0 < client["bytes_up"] <= bound and 0 < client["bytes_down"] <= bound for client in lines)


@pytest.mark.parametrize("aggregation", ["fedit", "flora"])
def test_one_base_model_a_process_from_fine_tuning_to_evaluation(pocket, saves, monkeypatch, aggregation):
    """Counts the entries of all live parameters while clients train with a KL reference and while the result is evaluated.

    With flora active adapter and reference have a side-car each. No tensor but the base's own has the shape of its embedding,
    which a merged or copied base would have.
    """
    base = AutoModelForCausalLM.from_pretrained(pocket.model)
    size, shape = sum(p.numel() for p in base.parameters()), base.get_input_embeddings().weight.shape
    own = len({p.data_ptr() for p in base.parameters() if p.shape == shape})
    del base
    release()
    gc.collect()
    gc.freeze()  # what lives already is not looked at
    counts, embeddings = [], []

    def counting(work):
        def counted(*arguments):
            gc.collect()
            live = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
            counts.append(sum(p.numel() for p in live if isinstance(p, torch.nn.Parameter)))
            embeddings.append(len({t.data_ptr() for t in live if t.shape == shape}))
            return work(*arguments)

        return counted

    try:
        tuned = finetune(pocket, saves, "ft", f"aggregation={aggregation}")
        monkeypatch.setattr(site, "client_update", counting(site.client_update))
        monkeypatch.setattr(measure, "evaluate_suite", counting(measure.evaluate_suite))
        judged = ("method.retain=kl", "eval.at_end=true", "eval.max_rows=1", "eval.max_new_tokens=2")
        run = unlearn(pocket, saves, tuned, "un", f"aggregation={aggregation}", *judged)
    finally:
        gc.unfreeze()
    adapter = sum(t.numel() for t in load_file(run / "start" / "adapter_model.safetensors").values())
    assert len(counts) == 9  # two rounds of four clients, and the evaluation
    assert size + adapter <= max(counts) <= size + 2 * adapter
    assert embeddings == [own] * 9
    assert list((run / "sidecar").glob("*")) if aggregation == "flora" else not (run / "sidecar").exists()
