"""MUSE as it is read: subsets, splits, hashes, chunks of articles, and every way in which a folder or a hub id can be wrong."""

import json
from dataclasses import replace

import datasets
import pytest
from helpers_eval import PHI_ARGS, SPECIAL, byte_tokenizer
from helpers_muse import muse_rows, write_muse
from tokenizers.processors import TemplateProcessing

from fedunlearn.data import muse_sources
from fedunlearn.data.chat import ChatFormat
from fedunlearn.data.muse import load_muse
from fedunlearn.data.muse_sources import MuseHub
from fedunlearn.data.tofu import QaRow
from fedunlearn.errors import UserError

ROWS = muse_rows()
SPLITS = [("raw", "forget"), ("knowmem", "forget_qa"), ("verbmem", "forget"), ("privleak", "holdout")]


@pytest.fixture
def folder(tmp_path):
    return write_muse(tmp_path / "muse")


def opening_chat(max_length):
    """The byte tokenizer with <|begin_of_text|> in front of every text, as Llama-2's has."""
    tokenizer = byte_tokenizer(None)
    opens = tokenizer.convert_tokens_to_ids(SPECIAL[0])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{SPECIAL[0]} $A", pair=None, special_tokens=[(SPECIAL[0], opens)]
    )
    return ChatFormat(tokenizer, PHI_ARGS, max_length), opens


def plain_chat(max_length):
    return ChatFormat(byte_tokenizer(None), PHI_ARGS, max_length)


class TestRows:
    def test_full_is_the_forget_articles_and_then_the_retain_articles(self, folder):
        muse = load_muse(str(folder))
        assert (muse.num_rows, muse.rows_per_author, muse.forget_rows("forget")) == (13, 1, (0, 1, 2, 3, 4))
        assert muse.texts("raw", "retain1")[2] == ROWS["raw/retain1"][2]["text"]

    def test_questions_and_passages_come_in_order(self, folder):
        muse = load_muse(str(folder))
        assert muse.questions("retain_qa")[1] == QaRow("Who retain 1?", "lantern .")
        assert [row.continuation for row in muse.passages("forget")] == [row["gt"] for row in ROWS["verbmem/forget"]]

    def test_a_split_is_read_once(self, folder, monkeypatch):
        muse, reads = load_muse(str(folder)), []
        real = muse_sources.read_rows
        monkeypatch.setattr(muse_sources, "read_rows", lambda path: reads.append(path.stem) or real(path))
        for _ in range(2):
            muse.hash("full")
            muse.forget_rows("forget")
        assert reads == ["forget", "retain1"]

    @pytest.mark.parametrize("form", ["list", "jsonl", "parquet", "shards"])
    def test_every_form_of_a_file_gives_the_same_rows(self, folder, form):
        before = {f"{subset}/{split}": load_muse(str(folder)).hash(f"{subset}/{split}") for subset, split in SPLITS}
        for name in before:
            path, rows = folder / f"{name}.json", ROWS[name]
            path.unlink()
            if form == "list":
                path.write_text(json.dumps(rows))
            elif form == "jsonl":
                path.with_suffix(".jsonl").write_text("\n".join(map(json.dumps, rows)))
            elif form == "parquet":
                datasets.Dataset.from_list(rows).to_parquet(path.with_suffix(".parquet"))
            else:
                for k, part in enumerate((rows[:2], rows[2:])):
                    shard = f"{path.stem}-0000{k}-of-00002.parquet"
                    datasets.Dataset.from_list(part).to_parquet(path.with_name(shard))
        muse = load_muse(str(folder))
        assert {name: muse.hash(name) for name in before} == before

    def test_a_hash_follows_texts_and_order_only(self, folder, tmp_path):
        muse, twin = load_muse(str(folder)), load_muse(str(write_muse(tmp_path / "twin")))
        assert muse.hash("full") == twin.hash("full") != muse.hash("raw/forget")
        turned = {**ROWS, "raw/forget": ROWS["raw/forget"][::-1]}
        assert load_muse(str(write_muse(tmp_path / "turned", turned))).hash("full") != muse.hash("full")

    def test_hub_rows_come_through_load_dataset(self, monkeypatch):
        asked = []

        def load(path, name, split):
            asked.append((path, name, split))
            if split == "forget_9":
                raise ValueError("Unknown split")
            return datasets.Dataset.from_list([{"text": "An article"}])

        monkeypatch.setattr(datasets, "load_dataset", load)
        monkeypatch.setattr(muse_sources, "hub_has", lambda key, name, layout: True)
        muse = load_muse("muse-bench/MUSE-News")
        assert muse.texts("raw", "forget") == ("An article",)
        assert asked == [("muse-bench/MUSE-News", "raw", "forget")]
        with pytest.raises(
            UserError, match=r"no readable split 'scal/forget_9' \(Unknown split\); choose a split .* another muse_path"
        ):
            muse.texts("scal", "forget_9")

    def test_a_split_without_rows_on_the_hub_is_told(self, monkeypatch):
        monkeypatch.setattr(
            datasets, "load_dataset", lambda path, name, split: datasets.Dataset.from_dict({"text": []})
        )
        monkeypatch.setattr(muse_sources, "hub_has", lambda key, name, layout: True)
        with pytest.raises(UserError, match=r"raw/forget has no row; fetch the data again"):
            load_muse("muse-bench/MUSE-News").check_splits("forget", "retain1")

    def test_no_network_is_told(self, monkeypatch):
        def load(path, name, split):
            raise ConnectionError("no route")

        monkeypatch.setattr(datasets, "load_dataset", load)
        with pytest.raises(
            UserError,
            match=r"muse_path='muse-bench/MUSE-News': split 'raw/forget' is not in the cache .*<subset>/<split>.json",
        ):
            MuseHub("muse-bench/MUSE-News", online=False).read("raw", "forget")


class TestChunks:
    def test_articles_are_joined_by_a_blank_line_and_cut(self, folder):
        """By the definition: the ids of the joined text, 20 at a time; the byte tokenizer opens texts with nothing, so each chunk's first id has no label."""
        muse, chat = load_muse(str(folder)), plain_chat(20)
        ids = chat.tokenizer("\n\n".join(row["text"] for row in ROWS["raw/forget"]), add_special_tokens=False)[
            "input_ids"
        ]
        want = [tuple(ids[i : i + 20]) for i in range(0, len(ids), 20)]
        found = muse.encode(chat, range(5))
        assert [row.input_ids for row in found] == want
        assert {row.num_prompt for row in found} == {1}

    def test_what_opens_a_text_stands_before_each_chunk_and_every_token_is_a_label(self, folder):
        chat, opens = opening_chat(16)
        ids = chat.text("a text of more than sixteen tokens", special=False)
        found = chat.chunks("a text of more than sixteen tokens")
        assert [row.labels for row in found] == [ids[:16], ids[16:32], ids[32:]]
        assert [row.input_ids for row in found] == [(opens, *ids[:16]), (opens, *ids[16:32]), (opens, *ids[32:])]

    @pytest.mark.parametrize(("length", "sizes"), [(8, [4, 4]), (9, [4, 4]), (10, [4, 4, 2]), (1, []), (2, [2])])
    def test_a_last_piece_without_a_label_is_dropped(self, length, sizes):
        assert [len(row.input_ids) for row in plain_chat(4).chunks("x" * length)] == sizes

    def test_forget_and_retain_articles_are_never_in_one_chunk(self, folder):
        """A client with articles 1, 3, 6 and 8: the chunks of all are those of its forget articles and then those of its retain articles."""
        muse, chat = load_muse(str(folder)), plain_chat(30)
        assert muse.encode(chat, (1, 3, 6, 8)) == (*muse.encode(chat, (1, 3)), *muse.encode(chat, (6, 8)))
        assert muse.encode(chat, (6, 1)) == (*muse.encode(chat, (1,)), *muse.encode(chat, (6,)))
        assert muse.encode(chat, ()) == ()

    def test_articles_of_one_token_give_nothing_to_learn(self, tmp_path):
        rows = {**ROWS, "raw/forget": [{"text": "x"}]}
        with pytest.raises(
            UserError, match=r"full row 0 \(an article; 1 together\) has fewer than two tokens.*take it out"
        ):
            load_muse(str(write_muse(tmp_path, rows))).encode(plain_chat(30), (0,))

    def test_answered_questions_stand_before_the_question(self):
        """open-unlearning's words: every pair closed by asst_end_tag, then the question, then the answer's tag."""
        chat = plain_chat(512)
        shots = (("Q1?", "A1"), ("Q2?", "A2"))
        told = "Question: Q1?\nAnswer: A1\n\nQuestion: Q2?\nAnswer: A2\n\nQuestion: Q3?\nAnswer: "
        assert chat.tokenizer.decode(chat.prompt("Q3?", shots)) == told
        row = chat.encode("Q3?", "A3", "row", shots)
        assert chat.tokenizer.decode(row.input_ids) == f"{told}A3{SPECIAL[9]}"
        assert chat.encode("Q3?", "A3", "row").input_ids != row.input_ids

    def test_a_chat_template_gets_them_as_turns(self):
        from helpers_eval import LLAMA3_ARGS

        chat = ChatFormat(byte_tokenizer(), replace(LLAMA3_ARGS), 512)
        text = chat.tokenizer.decode(chat.prompt("Q2?", (("Q1?", "A1"),)))
        assert text.count("<|eot_id|>") == 4
        assert text.index("Q1?") < text.index("A1") < text.index("Q2?")


class TestRefused:
    @pytest.mark.parametrize("path", ["./nowhere/muse", "/nowhere/muse", "a/b/c", "pocket:0", ""])
    def test_a_path_that_is_no_folder_is_refused_without_asking_the_hub(self, path, monkeypatch):
        monkeypatch.setattr(muse_sources, "hub_has", lambda *said: pytest.fail("asked the hub"))
        with pytest.raises(
            UserError, match=r"muse_path='.*' is no folder; give the folder .* or a hub id such as muse-bench/MUSE-News"
        ):
            load_muse(path)

    def test_a_missing_subset_and_a_missing_split_are_told_with_what_is_there(self, folder):
        for path in (folder / "verbmem").iterdir():
            path.unlink()
        (folder / "verbmem").rmdir()
        (folder / "raw" / "retain1.json").unlink()
        muse = load_muse(str(folder))
        with pytest.raises(UserError, match=r"no subset 'verbmem' .*it has: knowmem, privleak, raw\. Add it"):
            muse.passages("forget")
        with pytest.raises(
            UserError, match=r"no split 'retain1' in its subset 'raw'; it has: forget\. Add raw/retain1.json"
        ):
            muse.check_splits("forget", "retain1")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"body": "x"}', r"raw/forget row 0 needs a text in column 'text' and has 'body'; see the columns"),
            ('{"text": 3}', r"raw/forget row 0 needs a text in column 'text'"),
            ('{"text": "x"}\n{"text": " \\n"}', r"raw/forget row 1 is empty in column 'text'; take the row out"),
            ("not json", r"forget.json is neither JSON lines nor a JSON list"),
            ("", r"at least one row"),
        ],
    )
    def test_a_broken_split_is_named(self, folder, text, message):
        (folder / "raw" / "forget.json").write_text(text)
        with pytest.raises(UserError, match=message):
            load_muse(str(folder)).forget_rows("forget")

    def test_a_broken_parquet_file_is_named(self, folder):
        (folder / "raw" / "forget.json").unlink()
        (folder / "raw" / "forget.parquet").write_bytes(b"no parquet")
        with pytest.raises(
            UserError, match=r"forget.parquet is no parquet file that can be read .*fetch the file again"
        ):
            load_muse(str(folder)).texts("raw", "forget")

    @pytest.mark.parametrize(
        ("forget", "retain"), [("forget10", "retain90"), ("forget", "retain2"), ("forget_1", "retain1")]
    )
    def test_another_pair_of_splits_is_refused(self, folder, forget, retain):
        with pytest.raises(
            UserError,
            match=rf"forget_split='{forget}' and retain_split='{retain}' .*MUSE's pair is forget_split=forget with retain_split=retain1",
        ):
            load_muse(str(folder)).check_splits(forget, retain)
