"""What this model or machine cannot do is told before the first step, all of it at once."""

from dataclasses import replace

import pytest
import torch
from helpers_training import made_model, train, train_args

from fedunlearn.errors import UserError
from fedunlearn.training import able
from fedunlearn.training.able import check_able
from fedunlearn.training.optimizer import PACKAGES


@pytest.fixture
def made():
    return made_model()


def test_what_can_be_done_passes(made):
    check_able(made, train_args(gradient_checkpointing=True, optim="adamw_torch_fused", bf16=True))


def test_gradient_checkpointing_on_a_model_without_it(made):
    made.model.get_base_model().supports_gradient_checkpointing = False
    with pytest.raises(
        UserError,
        match=r"trainer\.args\.gradient_checkpointing=true: LlamaForCausalLM has no gradient checkpointing; set it to false and lower trainer\.args\.per_device_train_batch_size",
    ):
        check_able(made, train_args(gradient_checkpointing=True))
    check_able(made, train_args())


@pytest.mark.parametrize("optim", list(PACKAGES))
def test_an_optimiser_that_wants_cuda_on_the_cpu(made, optim):
    with pytest.raises(
        UserError,
        match=rf"trainer\.args\.optim={optim} needs a CUDA device, and the base is on the cpu: set adamw_torch",
    ):
        check_able(made, train_args(optim=optim))


@pytest.mark.parametrize("optim", list(PACKAGES))
def test_an_optimiser_whose_package_is_missing(made, optim, monkeypatch):
    """The record only says that the base is on a GPU: nothing is computed there."""
    monkeypatch.setattr(able.importlib.util, "find_spec", lambda name: None)
    package = PACKAGES[optim]
    with pytest.raises(UserError, match=rf"optim={optim} needs the package {package}.*fedunlearn\[{package}\]"):
        check_able(replace(made, device=torch.device("cuda")), train_args(optim=optim))


def test_what_counts_is_where_the_steps_are_made(made, monkeypatch):
    """With trainer.parallel the client's own process holds the base on the CPU, and others train on devices."""
    monkeypatch.setattr(able.importlib.util, "find_spec", lambda name: name)
    check_able(made, train_args(optim="adamw_bnb_8bit"), torch.device("cuda"))
    with pytest.raises(UserError, match=r"optim=adamw_bnb_8bit needs a CUDA device"):
        train(made, None, optim="adamw_bnb_8bit")


def test_compiling_without_a_compiler(made, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"trainer\.args\.torch_compile=true: on the cpu torch needs a C\+\+ compiler"):
        check_able(made, train_args(torch_compile=True))
    monkeypatch.setattr(able.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"torch_compile=true: on the cuda torch needs triton, which is not here"):
        check_able(replace(made, device=torch.device("cuda")), train_args(torch_compile=True))


def test_compiling_a_model_without_a_list_of_blocks(made):
    made.model.get_base_model().config.num_hidden_layers = 7
    with pytest.raises(UserError, match="LlamaForCausalLM has no list of decoder blocks"):
        check_able(made, train_args(torch_compile=True))


def test_all_faults_at_once_and_before_the_first_step(made):
    made.model.get_base_model().supports_gradient_checkpointing = False
    forwards = []
    made.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    with pytest.raises(UserError) as caught:
        train(made, gradient_checkpointing=True, optim="paged_adamw_8bit")
    assert len(caught.value.faults) == 2
    assert not forwards
    assert not made.model.training
