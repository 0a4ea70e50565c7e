"""One row's way from the partition to the evaluation, and requests in sequence: what was forgotten stays forgotten."""

import json
import shutil

import pytest
from helpers_requests import ROWS, author, client_rows, serve, watch
from helpers_runs import adapter_bytes, adapter_tensors, finetune, history, unlearn

from fedunlearn.data.tofu import load_tofu
from fedunlearn.doors import sequence
from fedunlearn.errors import UserError

LONG = ("trainer.args.num_train_epochs=4", "data.retain_per_forget=4")
BOTH = "requests=[{authors: [18]}, {authors: [19]}]"
EVAL = ("eval.at_end=true", "eval.max_new_tokens=1")


def test_one_row_from_the_partition_to_the_evaluation(pocket, saves, monkeypatch):
    """Row 77, of author 19, of client 3. In fine-tuning client 3 alone trains on it; unlearning has it in client 3's forget batches and nowhere else; the oracle never
    reads it; the evaluation of both asks its question."""
    seen, row = watch(monkeypatch), 77
    tuned = finetune(pocket, saves)
    dealt = json.loads((tuned / "partition.json").read_text())["clients"]
    assert [row in rows for rows in dealt] == [False, False, False, True]
    owners = {k: seen.of("ft", k) for k in range(4)}
    assert [row in rows for rows in owners.values()] == [False, False, False, True]
    assert set.union(*owners.values()) == set(range(ROWS))
    assert sum(len(rows) for rows in owners.values()) == ROWS
    assert [owners[k] for k in range(4)] == [set(rows) for rows in dealt] == [client_rows(k) for k in range(4)]

    gone = unlearn(pocket, saves, tuned, "un", *LONG, *EVAL)
    assert seen.roles("un") == [(0, "finetune"), (1, "finetune"), (2, "unlearn"), (3, "unlearn")]
    assert [row in seen.of("un", k) for k in range(4)] == [False, False, False, True]
    assert seen.of("un", 3) & author(18, 19) == author(19)
    assert seen.of("un", 2) & author(18, 19) == author(18)
    assert all(seen.of("un", k) <= client_rows(k) for k in range(4))
    assert seen.of("un", 3) - author(19)  # its retain rows beside them

    oracle = finetune(pocket, saves, "oracle", "data=retain", *EVAL)
    assert (oracle / "partition.json").read_text() == (tuned / "partition.json").read_text()
    assert seen.of("oracle") == set(range(ROWS)) - author(18, 19)

    question = load_tofu(str(pocket.data)).rows("full")[row].question
    for run in (gone, oracle):
        asked = json.loads((run / "TOFU_EVAL.json").read_text())["forget_Q_A_ROUGE"]["value_by_index"]
        assert len(asked) == 8
        assert question in asked[str(row - 72)]["input"]


class TestSequence:
    def test_what_the_first_forgot_comes_back_in_no_batch_of_the_second_nor_of_the_oracle(
        self, pocket, saves, monkeypatch
    ):
        seen = watch(monkeypatch)
        last = serve(pocket, saves, finetune(pocket, saves), "un", BOTH, *LONG)
        assert last == saves / "unlearn" / "un.2"
        first, second = seen.of("un.1"), seen.of("un.2")
        assert author(18) <= seen.of("un.1", 2, "unlearn")
        assert author(19) <= seen.of("un.1", 3, "finetune")  # it is not asked for yet
        assert not second & author(18)
        assert author(19) <= seen.of("un.2", 3, "unlearn")
        assert seen.of("un.2", 2) == client_rows(2) - author(18)
        assert first | second == set(range(ROWS))
        oracle = finetune(pocket, saves, "oracle", "data=retain", BOTH)
        assert seen.of("oracle") == set(range(ROWS)) - author(18, 19)
        assert adapter_bytes(oracle) == adapter_bytes(finetune(pocket, saves, "split", "data=retain"))

    def test_a_second_command_on_the_first_s_folder_is_the_same(self, pocket, saves):
        tuned = finetune(pocket, saves)
        together = serve(pocket, saves, tuned, "un", BOTH)
        first = serve(pocket, saves, tuned, "a", "requests=[{authors: [18]}]")
        second = serve(pocket, saves, first, "b", "requests=[{authors: [19]}]")
        assert first == saves / "unlearn" / "a"
        assert adapter_bytes(first) == adapter_bytes(saves / "unlearn" / "un.1")
        assert adapter_bytes(second) == adapter_bytes(together)
        assert json.loads((second / "request.json").read_text()) == {
            "rows": sorted(author(19)),
            "before": sorted(author(18)),
            "gone": [],
        }

    def test_the_second_begins_where_the_first_ended(self, pocket, saves):
        from safetensors.torch import load_file

        serve(pocket, saves, finetune(pocket, saves), "un", BOTH)
        began = load_file(saves / "unlearn" / "un.2" / "start" / "adapter_model.safetensors")
        ended = adapter_tensors(saves / "unlearn" / "un.1")
        assert all(began[name].equal(tensor) for name, tensor in ended.items())

    def test_rows_already_forgotten_are_refused(self, pocket, saves):
        first = serve(pocket, saves, finetune(pocket, saves), "a", "requests=[{authors: [18]}]")
        for again in ("{authors: [18]}", "{rows: [72, 0]}", "{authors: [17, 18]}"):
            with pytest.raises(
                UserError,
                match=r"requests: \d of its rows \(first: row 72 of full\) are forgotten already, by the run that the adapter comes from",
            ):
                serve(pocket, saves, first, "b", f"requests=[{again}]")
        with pytest.raises(
            UserError, match=r"forget_split='forget10': 4 of its rows \(first: row 72 of full\) are forgotten already"
        ):
            serve(pocket, saves, first, "b")
        assert not (saves / "unlearn" / "b").exists()

    def test_so_they_are_within_one_sequence_before_its_first_request_is_served(self, pocket, saves):
        with pytest.raises(UserError, match=r"4 of its rows \(first: row 76 of full\) are forgotten already"):
            serve(
                pocket,
                saves,
                finetune(pocket, saves),
                "un",
                "requests=[{authors: [19]}, {authors: [18]}, {authors: [19]}]",
            )
        assert not (saves / "unlearn").exists()

    @pytest.mark.parametrize(
        ("overrides", "said"),
        [
            ((), r"un\.2' holds an unfinished run of this config: resume=true goes on, overwrite=true starts anew"),
            (("trainer.args.seed=5",), r"un\.2' was made with another config \(differs in trainer\.args\.seed\)"),
        ],
    )
    def test_what_is_in_the_second_s_way_is_told_before_the_first_begins(self, pocket, saves, overrides, said):
        tuned = finetune(pocket, saves)
        there = serve(pocket, saves, tuned, "un", BOTH)
        (there / "done.json").unlink()
        shutil.rmtree(saves / "unlearn" / "un.1")
        with pytest.raises(UserError, match=said):
            serve(pocket, saves, tuned, "un", BOTH, *overrides)
        assert not (saves / "unlearn" / "un.1").exists()

    def test_the_folders_of_all_are_told_at_once_and_a_done_one_of_another_config_is_not_gone_on_from(
        self, pocket, saves
    ):
        tuned = finetune(pocket, saves)
        serve(pocket, saves, tuned, "un", BOTH)
        with pytest.raises(UserError) as caught:
            serve(pocket, saves, tuned, "un", BOTH, "trainer.args.seed=5", "resume=true")
        assert [
            f"un.{number}' was made with another config" in fault for number, fault in enumerate(caught.value.faults, 1)
        ] == [True, True]

    def test_a_done_sequence_is_repeated_and_that_is_said_once_a_run(self, pocket, saves, caplog):
        tuned = finetune(pocket, saves)
        for _ in range(2):
            caplog.clear()
            serve(pocket, saves, tuned, "un", BOTH)
        said = [
            record.getMessage() for record in caplog.records if "it is repeated from the start" in record.getMessage()
        ]
        assert len(said) == 2

    def test_a_client_asked_for_later_forgets_what_is_left_of_it(self, pocket, saves, monkeypatch):
        seen = watch(monkeypatch)
        last = serve(
            pocket,
            saves,
            finetune(pocket, saves),
            "un",
            "requests=[{authors: [19]}, {client: 3}]",
            "method.retain=none",
            "method.alpha=0",
        )
        assert seen.of("un.2", 3) == client_rows(3) - author(19)
        assert [client["num_trained"] for client in history(last)[0]["clients"]] == [20, 20, 20, 16]

    def test_resume_after_a_stop_between_them_goes_on_and_leaves_the_done_one_alone(self, pocket, saves, monkeypatch):
        tuned = finetune(pocket, saves)
        whole = serve(pocket, saves, tuned, "whole", BOTH)
        real, served = sequence.run_federated, []

        def stop_before_the_second(leg, carry):
            served.append(leg.run.task_name)
            if leg.run.task_name == "un.2":
                raise KeyboardInterrupt("stopped by the test")
            return real(leg, carry)

        monkeypatch.setattr(sequence, "run_federated", stop_before_the_second)
        with pytest.raises(KeyboardInterrupt, match="stopped by the test"):
            serve(pocket, saves, tuned, "un", BOTH)
        first = saves / "unlearn" / "un.1"
        before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
        monkeypatch.setattr(
            sequence, "run_federated", lambda leg, carry: (served.append(leg.run.task_name), real(leg, carry))[1]
        )
        last = serve(pocket, saves, tuned, "un", BOTH, "resume=true")
        assert served == ["un.1", "un.2", "un.2"]
        assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before
        assert adapter_bytes(last) == adapter_bytes(whole)

    def test_resume_after_a_stop_within_the_second_goes_on_at_its_next_round(self, pocket, saves, monkeypatch):
        from fedunlearn.federation import rounds

        tuned = finetune(pocket, saves)
        whole = serve(pocket, saves, tuned, "whole", BOTH)
        real = rounds.save_checkpoint

        def save_and_stop(folder, checkpoint, *rest):
            real(folder, checkpoint, *rest)
            if folder.name == "un.2":
                raise KeyboardInterrupt("stopped by the test")

        monkeypatch.setattr(rounds, "save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt, match="stopped by the test"):
            serve(pocket, saves, tuned, "un", BOTH)
        monkeypatch.setattr(rounds, "save_checkpoint", real)
        seen = watch(monkeypatch)
        last = serve(pocket, saves, tuned, "un", BOTH, "resume=true")
        assert adapter_bytes(last) == adapter_bytes(whole)
        assert not seen.of("un.1")
        assert [line["round"] for line in history(last)] == [1, 2]


FOUR = ("experiment=replay/tofu/pocket", "trainer.federated.num_rounds=4", "trainer.federated.keep_rounds=all")


class TestReplaysInSequence:
    """Replay uses fine-tuning's rounds only, without all targets so far."""

    def test_a_rollback_of_the_second_goes_back_behind_the_first_too(self, pocket, saves, monkeypatch):
        """All were there from round 1: nothing of either is ever read again."""
        tuned = finetune(pocket, saves, "ft", *FOUR[1:])
        seen = watch(monkeypatch)
        last = serve(pocket, saves, tuned, "un", *FOUR, "method=rollback", BOTH)
        assert [line["round"] for line in history(last)] == [1, 2, 3, 4]
        assert seen.of("un.1") == set(range(ROWS)) - author(18)
        assert seen.of("un.2") == set(range(ROWS)) - author(18, 19)

    def test_and_where_the_second_joined_late(self, pocket, saves, caplog):
        late = (*FOUR[1:], "partition.joins={3: 3}")
        tuned = finetune(pocket, saves, "ft", *late)
        last = serve(pocket, saves, tuned, "un", *FOUR, *late, "method=rollback", "requests=[{client: 2}, {client: 3}]")
        oracle = finetune(pocket, saves, "oracle", *late, "data=retain", "requests=[{client: 2}, {client: 3}]")
        assert adapter_bytes(last) == adapter_bytes(oracle)

    @pytest.mark.parametrize("kept", [(), ("ledger.purge=false",)])
    def test_federaser_leaves_the_first_s_old_updates_out_of_the_second(self, pocket, saves, kept):
        tuned = finetune(pocket, saves, "ft", *FOUR[1:], "ledger.enabled=true")
        last = serve(pocket, saves, tuned, "un", *FOUR, *kept, "method=federaser", BOTH)
        weights = {client["client_id"]: client["weight"] for client in history(last)[0]["clients"]}
        assert weights == pytest.approx({0: 0.5, 1: 0.5, 2: 0, 3: 0})

    def test_an_owner_that_is_gone_stays_gone(self, pocket, saves):
        tuned = finetune(pocket, saves, "ft", *FOUR[1:])
        last = serve(
            pocket,
            saves,
            tuned,
            "un",
            *FOUR,
            "method=rollback",
            "requests=[{authors: [18], target: gone}, {authors: [19]}]",
        )
        assert all(client["client_id"] != 2 for line in history(last) for client in line["clients"])

    def test_one_that_is_gone_takes_no_part_though_it_has_rows_to_keep(self, pocket, saves, monkeypatch):
        tuned = finetune(pocket, saves, "ft", *FOUR[1:])
        seen = watch(monkeypatch)
        for target, there in (("stays", True), ("gone", False)):
            serve(
                pocket,
                saves,
                tuned,
                target,
                *FOUR,
                "method=rollback",
                f"requests=[{{authors: [18], target: {target}}}]",
            )
            assert bool(seen.of(target, 2)) == there
            assert not seen.of(target) & author(18)
