"""AdaLoRA's penalty: the loss that PEFT's own model adds, once a step, beside every method's loss; what is gone stays gone."""

import pytest
import torch
from helpers_eval import tiny_chat, tiny_llama
from helpers_training import DATA, EVERY, gradient, made_model, name_of, train, with_alternates
from peft import AdaLoraConfig

from fedunlearn.aggregation.adalora import triplets_of
from fedunlearn.models.adapter_tensors import live_parameters, read_tensors, write_tensors
from fedunlearn.models.lora import attach_lora, check_trainable, hold_reference
from fedunlearn.models.lora_config import plain_config
from fedunlearn.models.resident import Resident
from fedunlearn.records.adapter import Adapter
from fedunlearn.training.orthogonality import orthogonality, pull_to_orthogonal


def adalora_model(weight=0.5, gone=0, dtype=torch.float32):
    """A tiny Llama with AdaLoRA over it, every tensor of which acts, but for the first `gone` ranks of each module."""
    base = tiny_llama().to(dtype).requires_grad_(False)
    base.name_or_path = "base"
    config = AdaLoraConfig(init_r=3, target_r=1, total_step=9, lora_alpha=4, target_modules="all-linear", orth_reg_weight=weight, task_type="CAUSAL_LM")  # fmt: skip
    model = attach_lora(base, config)
    generator = torch.Generator().manual_seed(3)
    values = {n: 0.3 * torch.randn(t.shape, generator=generator) for n, t in read_tensors(model).items()}
    for module in triplets_of(values):
        values[module.e][:gone] = 0
        values[module.b][:, :gone] = 0
    write_tensors(model, values)
    start = Adapter(read_tensors(model), plain_config(config), "print")
    return Resident(model.eval(), tiny_chat(), "print", "a tiny base", torch.device("cpu"), start)


def peft_s_penalty(made):
    """What PEFT's model adds to a loss, and its gradient by the names of the wire."""
    model, live = made.model, live_parameters(made.model)
    ids = torch.arange(12).reshape(2, 6)
    model.zero_grad()
    whole = model(input_ids=ids, labels=ids).loss
    own = model.get_base_model()(input_ids=ids, labels=ids).loss
    (whole - own).backward()
    found = {name: p.grad.clone() for name, p in live.items() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return float((whole - own).detach()), found


def test_it_is_what_peft_adds_to_a_loss():
    made = adalora_model(weight=0.7)
    value, wanted = peft_s_penalty(made)
    live = live_parameters(made.model)
    factors = [f for m in triplets_of(live) for f in (live[m.a], live[m.b].T)]
    assert float(0.7 * orthogonality(factors).detach()) == pytest.approx(value, rel=1e-5)
    pull_to_orthogonal(live, 0.7)
    for module in triplets_of(live):
        assert live[module.e].grad is None
        for name in (module.a, module.b):
            assert torch.allclose(live[name].grad, wanted[name], rtol=1e-4, atol=1e-6)
            assert live[name].grad.any()


def test_by_hand_and_at_its_least():
    """P = [[2]]: ||4 - 1|| = 3; P = [[1, 0], [0, 1]]: 0, and no nan in its gradient; the mean of both is 1.5."""
    two, one = torch.tensor([[2.0]]), torch.eye(2, requires_grad=True)
    assert float(orthogonality([two])) == 3
    value = orthogonality([two, one])
    value.backward()
    assert float(value) == 1.5
    assert torch.equal(one.grad, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="no factors"):
        orthogonality([])


@pytest.mark.parametrize("method", [None, *EVERY], ids=lambda m: "finetune" if m is None else name_of(m))
def test_every_method_s_step_has_it_once(method):
    """However many micro-batches: the gradient of a step with it less the one without is PEFT's. The loss that is told is the method's own."""
    data = DATA if method is None or method.alternates == "none" else with_alternates()
    plain, with_it = adalora_model(weight=0.0), adalora_model(weight=0.5)
    for made in (plain, with_it) if method is not None else ():
        hold_reference(made.model, made.start.weights)
    _, wanted = peft_s_penalty(with_it)
    more = {"gradient_accumulation_steps": 2, "data": data}
    first, second = gradient(plain, method, **more), gradient(with_it, method, **more)
    names = sorted(with_it.start.tensors)
    flat = torch.cat([wanted.get(n, torch.zeros_like(with_it.start.tensors[n])).flatten() for n in names])
    assert (second - first - flat).abs().max() < 1e-5 * max(float(first.abs().max()), 1)
    assert flat.abs().max() > 1e-3
    assert train(plain, method, data, max_steps=1).loss == train(with_it, method, data, max_steps=1).loss


def test_ranks_that_are_gone_stay_gone_through_training():
    """E and B's column 0: no loss and no penalty moves them, under AdamW with weight decay, in several steps."""
    made = adalora_model(gone=2)
    done = train(made, epochs=3, learning_rate=1e-2, weight_decay=0.1)
    for module in triplets_of(done.tensors):
        assert not done.tensors[module.e][:2].any()
        assert not done.tensors[module.b][:, :2].any()
        assert not torch.equal(done.tensors[module.e][2:], made.start.tensors[module.e][2:])


def test_a_mask_of_e_alone_can_be_trained_away():
    made = adalora_model()
    tensors = {n: torch.zeros_like(t) if n.endswith(".lora_E") else t for n, t in made.start.tensors.items()}
    made = Resident(made.model, made.chat, "print", "a tiny base", made.device, made.start.replace(tensors))
    done = train(made)
    assert all(done.tensors[m.e].all() for m in triplets_of(done.tensors))


def test_plain_lora_has_no_penalty_and_nothing_is_added_for_weight_0():
    live = live_parameters(made_model().model)
    pull_to_orthogonal(live, 0.0)
    assert all(p.grad is None for p in live.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_peft_divides_by_is_not_trained(dtype):
    """On a bfloat16 base PEFT's own cast makes a trained parameter of the rank."""
    made = adalora_model(dtype=dtype)
    check_trainable(made.model)
    hold_reference(made.model, made.start.weights)
    ranks = {n: p for n, p in made.model.named_parameters() if ".ranknum." in n}
    assert len(ranks) == 2 * 14
    assert not any(p.requires_grad for p in ranks.values())
    assert {float(p) for p in ranks.values()} == {3.0}
    before = {n: float(p) for n, p in ranks.items()}
    done = train(made)
    assert {n: float(p) for n, p in ranks.items()} == before
    assert done.tensors.keys() == made.start.tensors.keys()


def test_checkpointing_changes_nothing():
    made = adalora_model()
    wanted = gradient(made)
    assert (gradient(made, gradient_checkpointing=True) - wanted).abs().max() < 1e-5 * wanted.abs().max()
