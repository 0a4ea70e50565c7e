"""What can only be told once the model is loaded, and is told before anything is written."""

import pytest
from helpers_runs import finetune, tiny

from fedunlearn.doors.prepare import prepare
from fedunlearn.errors import UserError

WIDE = "model.model_args.lora_config.r=40"  # the tiny pocket's base is 32 wide
PRODUCT = ("aggregation=flexlora",)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (PRODUCT, "aggregation.reducer=product"),
        (("aggregation.gauge=balanced",), "aggregation.gauge=balanced"),
        (("aggregation=fedsvd",), "aggregation.gauge=orthonormal"),
        (("aggregation=flora", "aggregation.export_rank=r"), "aggregation.export_rank=r"),
    ],
)
def test_a_rank_that_no_module_can_have_is_refused_where_an_svd_is_to_give_it(pocket, saves, overrides, said):
    with pytest.raises(
        UserError,
        match=rf"^{said} with rank 40 .* of module '.*', whose sides are \d+ and \d+: its product has \d+ directions at most; lower r",
    ):
        prepare(tiny(pocket, saves, "finetune", "ft", WIDE, *overrides))
    assert not saves.exists()


@pytest.mark.parametrize("overrides", [(), ("aggregation=flora",), ("aggregation=fedex",), ("aggregation=hetlora",)])
def test_where_no_svd_asks_for_it_any_rank_goes(pocket, saves, overrides):
    assert prepare(tiny(pocket, saves, "finetune", "ft", WIDE, *overrides)).folder.is_dir()


def test_a_rank_as_large_as_the_smaller_side_goes(pocket, saves):
    run = finetune(pocket, saves, "ft", *PRODUCT, "model.model_args.lora_config.r=32", "trainer.federated.num_rounds=1")
    assert (run / "done.json").is_file()


def test_a_form_of_the_side_car_where_there_is_none_is_refused(pocket, saves):
    with pytest.raises(
        UserError,
        match=r"^aggregation\.export_rank=r beside aggregation\.residual=dropped: there is no side-car to be taken in",
    ):
        prepare(tiny(pocket, saves, "finetune", "ft", "aggregation.export_rank=r"))
    assert not saves.exists()


def test_a_side_car_that_the_start_brings_along_may_be_taken_in(pocket, saves):
    stacked = finetune(pocket, saves, "ft", "aggregation=flora", "trainer.federated.num_rounds=1")
    named = f"model.model_args.pretrained_model_name_or_path={stacked}"
    composed = tiny(pocket, saves, "unlearn", "un", named, "aggregation.export_rank=r")
    assert prepare(composed).start.sidecar
