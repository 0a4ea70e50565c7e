"""Clients that come late, and partitions that are read from a file: what is asked of them, and what is refused."""

import json
from collections.abc import Iterator

import pytest
from helpers_runs import adapter_bytes, finetune, history, unlearn

from fedunlearn.errors import UserError
from fedunlearn.federation import client_app
from fedunlearn.federation.wire import RollCallReply

LATE = ("partition.joins={3: 3}", "trainer.federated.num_rounds=4")


def cohorts(run):
    return [[client["client_id"] for client in line["clients"]] for line in history(run)]


class TestJoins:
    def test_a_late_client_is_not_drawn_before_its_round(self, pocket, saves):
        late = finetune(pocket, saves, "late", *LATE)
        assert cohorts(late) == [[0, 1, 2], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]]
        weights = [[client["weight"] for client in line["clients"]] for line in history(late)]
        assert weights[1] == pytest.approx([1 / 3] * 3)
        assert weights[2] == pytest.approx([1 / 4] * 4)

    def test_nor_where_the_draw_would_have_taken_it_and_then_it_has_its_turn(self, pocket, saves):
        """Two of four in eight rounds: nobody's place is left empty for it, and from its round on it is drawn as others are."""
        few = ("trainer.federated.num_train_clients=2", "trainer.federated.num_rounds=8")
        always, late = (
            cohorts(finetune(pocket, saves, name, *few, *joins))
            for name, joins in (("always", ()), ("late", ("partition.joins={3: 5}",)))
        )
        assert all(len(cohort) == 2 for cohort in late)
        assert any(3 in cohort for cohort in always[:4])
        assert not any(3 in cohort for cohort in late[:4])
        assert late[4:] == always[4:]
        assert any(3 in cohort for cohort in late[4:])

    def test_it_is_declared_at_the_roll_call(self, pocket, saves):
        members = json.loads((finetune(pocket, saves, "late", *LATE) / "roll_call.json").read_text())["members"]
        assert {int(k): member["joins"] for k, member in members.items()} == {0: 1, 1: 1, 2: 1, 3: 3}

    def test_a_client_that_says_otherwise_is_refused_and_left_out(self, pocket, saves, monkeypatch):
        """It says it was there from round 1: drawn, it would be in rounds that it is to have no part in."""

        def lying(**said):
            return RollCallReply(**{**said, "joins": 1})

        monkeypatch.setattr(client_app, "RollCallReply", lying)
        late = finetune(pocket, saves, "late", *LATE)
        refused = json.loads((late / "roll_call.json").read_text())["refused"]
        assert "roll call: client 3 joins in round 1, by the config in round 3" in refused
        assert cohorts(late) == [[0, 1, 2]] * 4

    def test_it_is_one_and_the_same_run_where_it_joins_in_round_1(self, pocket, saves):
        plain, named = (
            finetune(pocket, saves, "plain"),
            finetune(pocket, saves, "named", "partition.joins={3: 1, 0: 1}"),
        )
        assert adapter_bytes(plain) == adapter_bytes(named)

    @pytest.mark.parametrize(
        ("joins", "said"),
        [
            ("{4: 2}", r"partition.joins=\{4: 2\}: clients are 0 to 3, rounds 1 to 2"),
            ("{-1: 2}", r"partition.joins=\{-1: 2\}: clients are 0 to 3"),
            ("{3: 3}", r"partition.joins=\{3: 3\}: clients are 0 to 3, rounds 1 to 2"),
            ("{3: 0}", r"partition.joins=\{3: 0\}: rounds count from 1"),
            ("{0: 2, 1: 2, 2: 2, 3: 2}", r"leaves fewer clients in round 1 than trainer.federated.min_clients=1"),
        ],
    )
    def test_rounds_and_clients_that_are_not_there_are_refused(self, pocket, saves, joins, said):
        with pytest.raises(UserError, match=said):
            finetune(pocket, saves, "x", f"partition.joins={joins}")
        assert not (saves / "finetune").exists()


class TestFiles:
    """partition.path names a file made by hand: the one a run wrote, changed."""

    @pytest.fixture(scope="class")
    @staticmethod
    def written(pocket, tmp_path_factory) -> Iterator[dict]:
        run = finetune(pocket, tmp_path_factory.mktemp("runs"))
        return json.loads((run / "partition.json").read_text())

    def tuned(self, pocket, saves, written, task="ft", keep_hash=False, more=(), **changes):
        text = {**written, **changes}
        if not keep_hash:
            text.pop("hash")
        path = saves.parent / "mine.json"
        path.write_text(json.dumps(text))
        return finetune(pocket, saves, task, "partition=inherit", f"partition.path={path}", *more)

    def test_the_file_alone_gives_the_run_that_wrote_it(self, pocket, saves, written):
        """Rows of client 0 and 1 exchanged is another federation; the file as it is, the same."""
        same = self.tuned(pocket, saves, written)
        exchanged = self.tuned(
            pocket, saves, written, "other", clients=[*written["clients"][1::-1], *written["clients"][2:]]
        )
        assert json.loads((same / "partition.json").read_text())["hash"] == written["hash"]
        assert json.loads((exchanged / "partition.json").read_text())["hash"] != written["hash"]
        assert adapter_bytes(same) == adapter_bytes(finetune(pocket, saves, "made"))
        assert adapter_bytes(same) != adapter_bytes(exchanged)

    def test_an_overlap_is_refused(self, pocket, saves, written):
        clients = [[*written["clients"][0], *written["clients"][1][:4]], *written["clients"][1:]]
        with pytest.raises(UserError, match=r"gives a row to two clients: every row has one owner"):
            self.tuned(pocket, saves, written, clients=clients)
        assert not (saves / "finetune").exists()

    def test_a_gap_is_refused_or_trains_with_a_warning_and_its_rows_cannot_be_unlearned(
        self, pocket, saves, written, caplog
    ):
        """Client 3 has no author 19 (rows 76 to 79): nobody owns them, and forget10 (authors 18 and 19) names them."""
        clients = [*written["clients"][:3], [row for row in written["clients"][3] if row < 76]]
        with pytest.raises(
            UserError, match=r"4 rows of full \(first: row 76\) belong to no client, and nobody would train on them"
        ):
            self.tuned(pocket, saves, written, clients=clients)
        assert not (saves / "finetune").exists()
        gap = self.tuned(pocket, saves, written, "gap", more=["partition.allow_gaps=true"], clients=clients)
        assert "4 rows of full belong to no client of the partition: nobody trains on them" in caplog.text
        with pytest.raises(
            UserError, match=r"forget_split='forget10': 4 of its rows \(first: row 76 of full\) belong to no client"
        ):
            unlearn(pocket, saves, gap)
        with pytest.raises(UserError, match=r"requests: 1 of its rows \(first: row 77 of full\) belong to no client"):
            unlearn(pocket, saves, gap, "x", "requests=[{rows: [72, 77]}]")
        assert not (saves / "unlearn").exists()
        assert unlearn(pocket, saves, gap, "y", "requests=[{authors: [18]}]").is_dir()

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"data_hash": "0" * 64}, r"the partition was made over other data than tofu_path="),
            ({"rows_per_author": 2}, r"the partition says rows_per_author=2, .* has 4: correct the partition"),
        ],
    )
    def test_other_data_is_refused(self, pocket, saves, written, changes, said):
        with pytest.raises(UserError, match=said):
            self.tuned(pocket, saves, written, **changes)
        assert not (saves / "finetune").exists()

    def test_rows_that_are_not_there_and_authors_in_two_are_refused(self, pocket, saves, written):
        clients = [list(rows) for rows in written["clients"]]
        with pytest.raises(UserError, match=r"gives client 3 row 80, full has rows 0 to 79"):
            self.tuned(pocket, saves, written, clients=[*clients[:3], [*clients[3], 80]])
        clients[0].append(clients[1].pop())
        with pytest.raises(
            UserError, match=r"splits the author of rows \d+ to \d+: an author belongs whole to one client"
        ):
            self.tuned(pocket, saves, written, clients=clients)

    def test_a_change_that_leaves_the_old_hash_is_refused(self, pocket, saves, written):
        with pytest.raises(UserError, match=r"does not match the hash in it: it was changed after it was written"):
            self.tuned(
                pocket,
                saves,
                written,
                keep_hash=True,
                clients=[written["clients"][1], written["clients"][0], *written["clients"][2:]],
            )

    def test_other_owners_than_the_run_s_are_refused_in_unlearning(self, pocket, saves, written):
        tuned = finetune(pocket, saves)
        text = {**written, "clients": written["clients"][::-1]}
        del text["hash"]
        (saves.parent / "mine.json").write_text(json.dumps(text))
        with pytest.raises(UserError, match=r"gives rows to other clients than .* by which the adapter was trained"):
            unlearn(pocket, saves, tuned, "un", f"partition.path={saves.parent / 'mine.json'}")
