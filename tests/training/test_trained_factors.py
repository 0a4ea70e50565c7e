"""A mask: only the factors of the task move; the other stays bit by bit, has no gradient, and nothing switches it on again."""

import pytest
import torch
from helpers_adapters import live_gradients
from helpers_training import DATA, GRADIENT, RATE, flat, made_model, train
from peft import LoraConfig
from transformers import AutoModelForCausalLM, MixtralConfig

from fedunlearn.methods.grad_diff import GradDiff
from fedunlearn.methods.npo import NPO
from fedunlearn.models import adapter_tensors
from fedunlearn.models.adapter_tensors import live_parameters, live_tensors, read_tensors, write_tensors
from fedunlearn.models.lora import attach_lora, check_trainable, hold_reference, reference_active, training_only
from fedunlearn.records.adapter import Weights
from fedunlearn.records.rounds import Trained
from fedunlearn.training import loop
from fedunlearn.training.loop import _anchors, _pull_to_start

METHODS = [
    pytest.param(None, id="finetune"),
    pytest.param(NPO(), id="npo"),
    pytest.param(NPO(retain="kl"), id="npo kl"),
]
ONE = [Trained.A, Trained.B]


@pytest.fixture(scope="module")
def made():
    """The reference differs from the adapter that training starts from, so that KL has a gradient."""
    model = made_model()
    hold_reference(model.model, Weights({name: 0.5 * t for name, t in model.start.tensors.items()}))
    return model


def of(trained, tensors):
    """The factors that rest and those that move."""
    rest = {name: tensor for name, tensor in tensors.items() if not trained.covers(name)}
    return rest, {name: tensor for name, tensor in tensors.items() if trained.covers(name)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("trained", ONE)
class TestOneFactor:
    def test_the_other_stays_bit_by_bit_and_every_tensor_of_its_own_moves(self, made, method, trained):
        usual = {"epochs": 2, "learning_rate": 0.1, "weight_decay": 0.5}
        result = train(made, method, trained=trained, mu=0.5, **usual)
        rest, moved = of(trained, result.tensors)
        assert len(rest) == len(moved) == 14
        assert all(torch.equal(tensor, made.start.tensors[name]) for name, tensor in rest.items())
        assert not any(torch.equal(tensor, made.start.tensors[name]) for name, tensor in moved.items())

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_it_has_no_gradient_at_any_step(self, made, method, trained, checkpointing, monkeypatch):
        seen, real = [], loop._backward

        def looking(*arguments):
            told = real(*arguments)
            with_gradient = {
                name.replace(".default.", ".") for name, p in made.model.named_parameters() if p.grad is not None
            }
            seen.append((with_gradient, set(live_parameters(made.model))))
            return told

        monkeypatch.setattr(loop, "_backward", looking)
        train(made, method, trained=trained, epochs=2, gradient_checkpointing=checkpointing)
        wanted = set(of(trained, made.start.tensors)[1])
        assert len(seen) >= 4
        assert all(both == (wanted, wanted) for both in seen)

    def test_the_gradient_of_the_others_is_what_it_is_when_both_train(self, made, method, trained):
        """One step of SGD without clipping: the first gradient of a factor does not ask whether the other one has one."""
        alone = train(made, method, trained=trained, **GRADIENT)
        both = train(made, method, **GRADIENT)
        _, found = of(trained, alone.tensors)
        _, wanted = of(trained, both.tensors)
        step = (flat(wanted) - flat(of(trained, made.start.tensors)[1])).abs().max()
        assert step / RATE > 1e-3
        assert (flat(found) - flat(wanted)).abs().max() <= 1e-5 * step

    def test_only_the_norm_of_its_own_gradient_is_clipped(self, made, method, trained):
        result = train(made, method, trained=trained, **{**GRADIENT, "max_grad_norm": 0.01})
        moved = of(trained, result.tensors)[1]
        step = flat(of(trained, made.start.tensors)[1]) - flat(moved)
        assert (step / RATE).norm().item() == pytest.approx(0.01, rel=1e-3)

    def test_afterwards_both_are_trainable_again(self, made, method, trained):
        train(made, method, trained=trained)
        check_trainable(made.model)
        assert all(parameter.grad is None for parameter in made.model.parameters())
        whole = train(made, method)
        assert not any(torch.equal(whole.tensors[name], tensor) for name, tensor in made.start.tensors.items())

    def test_an_error_inside_leaves_both_trainable(self, made, method, trained, monkeypatch):
        def broken(*arguments):
            raise RuntimeError("broken step")

        monkeypatch.setattr(loop, "_totals", broken)
        with pytest.raises(RuntimeError, match="broken step"):
            train(made, method, trained=trained)
        check_trainable(made.model)


@pytest.mark.parametrize("trained", ONE)
def test_the_reference_s_turn_does_not_switch_the_other_factor_on_again(made, trained):
    """PEFT's set_adapter makes every tensor of the adapter it activates trainable."""
    with training_only(made.model, trained):
        before = set(live_parameters(made.model))
        with reference_active(made.model):
            assert not any(p.requires_grad for p in made.model.parameters())
        assert set(live_parameters(made.model)) == before == set(of(trained, made.start.tensors)[1])
    check_trainable(made.model)


def test_both_is_what_no_mask_is(made):
    with training_only(made.model, Trained.BOTH):
        check_trainable(made.model)
    assert torch.equal(flat(train(made, NPO(), trained=Trained.BOTH).tensors), flat(train(made, NPO()).tensors))


class TestFedProx:
    """mu comes with the task, and pulls what trains alone."""

    @pytest.mark.parametrize("trained", [Trained.BOTH, *ONE])
    def test_the_pull_is_over_the_trained_tensors(self, made, trained):
        """Two steps of SGD: at w_1 the pull is mu (w_1 - x), in the factors that train; the others' distance is 0 and stays 0."""
        mu, rate = 3.0, 0.25
        usual = {**GRADIENT, "learning_rate": rate, "trained": trained}
        one = train(made, GradDiff(), **usual)
        free, pulled = (train(made, GradDiff(), mu=m, **{**usual, "max_steps": 2}) for m in (0.0, mu))
        pull = mu * (flat(one.tensors) - flat(made.start.tensors))
        assert pull.abs().max() > 1e-2
        assert (flat(free.tensors) - flat(pulled.tensors) - rate * pull).abs().max() < 1e-5 * pull.abs().max()

    def test_a_step_does_not_ask_for_state_and_scales_anew(self, made, monkeypatch):
        """Both walk all modules: 50 ms of a step of 32 tiny layers."""
        asked, own = [], adapter_tensors.get_peft_model_state_dict
        monkeypatch.setattr(
            adapter_tensors, "get_peft_model_state_dict", lambda *s, **m: asked.append(1) or own(*s, **m)
        )
        scales = loop.module_scales
        monkeypatch.setattr(loop, "module_scales", lambda model: asked.append(1) or scales(model))
        counts = []
        for steps in (1, 6):
            asked.clear()
            result = train(made, None, DATA, epochs=6, mu=1.0, radius=0.5, max_steps=steps, optim="sgd")
            assert result.num_steps == steps
            counts.append(len(asked))
        assert counts[0] == counts[1]

    def test_fused_experts_are_pulled_as_pairs_are(self):
        """Bit by bit the sum over each expert's own tensors, whose parameter is one."""
        small = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        base = AutoModelForCausalLM.from_config(MixtralConfig(vocab_size=64, num_local_experts=3, **small))
        lora = LoraConfig(
            r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"], task_type="CAUSAL_LM"
        )
        model = attach_lora(base.requires_grad_(False), lora)
        generator = torch.Generator().manual_seed(0)
        start = {n: torch.randn(t.shape, generator=generator) for n, t in read_tensors(model).items()}
        write_tensors(model, start)
        live, now = live_parameters(model), live_tensors(model)
        anchors = _anchors(live, start)
        for name, parameter in live.items():
            parameter.grad = torch.randn(parameter.shape, generator=generator) if "q_proj.lora_A" not in name else None
            with torch.no_grad():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        wanted = {n: g.clone().add_(now[n] - start[n], alpha=0.3) for n, g in live_gradients(model).items()}
        _pull_to_start(live, anchors, 0.3)
        assert sum(".experts." in name for name in wanted) == 6
        assert all(torch.equal(gradient, wanted[name]) for name, gradient in live_gradients(model).items())

    def test_mu_0_is_no_term(self, made):
        assert torch.equal(
            flat(train(made, NPO(), mu=0.0, epochs=2).tensors), flat(train(made, NPO(), epochs=2).tensors)
        )

    def test_it_pulls_to_what_the_round_began_with_and_not_to_the_reference(self, made):
        """A strong pull over many steps keeps the adapter near its start, of which the reference here is far."""
        strong = train(made, None, DATA, epochs=10, mu=50.0, optim="sgd", learning_rate=1e-2, max_grad_norm=0.0)
        free = train(made, None, DATA, epochs=10, optim="sgd", learning_rate=1e-2, max_grad_norm=0.0)
        start = flat(made.start.tensors)
        assert (flat(strong.tensors) - start).norm() < 0.5 * (flat(free.tensors) - start).norm()
