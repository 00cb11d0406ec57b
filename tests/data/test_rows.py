"""Rows: what is drawn, what is left out and named, and what a mixture holds."""

import random
import shutil

import numpy as np
import pytest
import torch
from conftest import picture
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from torch.utils.data import DataLoader

from imageprompt.data.augmenting import augmentation
from imageprompt.data.rows import BrokenRow, Mixture, Rows, StreamMixture, read_rows, stream_rows
from imageprompt.data.sources import Source, undecoded
from imageprompt.data.texts import separate

CAPTIONS = [["a dog", "one dog"], ["a cat", "one cat"]]


def rows_of(columns, *, features=None, rows=Rows, **settings):
    names = ("draw", "max_broken", "augment", "texts_per_image", "seed")
    options = {name: settings.pop(name) for name in names if name in settings}
    dataset = undecoded(Dataset.from_dict(columns, features=features))
    return rows(dataset, Source("the data", **settings), **options)


@pytest.fixture
def photos(tmp_path):
    """Paths of six images, of which the third is broken and the fourth cut short."""
    for number in range(6):
        picture(number).resize((64, 64)).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_bytes(b"no image")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:200])
    return [str(tmp_path / f"{number}.png") for number in range(6)]


def test_one_caption_of_several_is_drawn_at_every_reading(photos):
    rows = rows_of({"image": photos[:2], "captions": CAPTIONS}, suffix_column="captions")
    assert {rows[0]["suffix"] for _ in range(30)} == {"a dog", "one dog"}
    assert rows[0]["text"] == ""
    assert rows.texts(1) == ("", ["a cat", "one cat"])
    first = rows_of({"image": photos[:2], "captions": CAPTIONS}, suffix_column="captions", draw=False)
    assert {first[1]["suffix"] for _ in range(10)} == {"a cat"}


def test_prompts_come_from_a_column_or_are_one_for_all_or_a_template():
    columns = {"q": ["A?", "B?"], "a": ["yes", "no"]}
    settings = {"image_column": "none", "suffix_column": "a"}
    assert rows_of(columns, text_column="q", **settings)[1] == {"text": "B?", "suffix": " no"}
    assert rows_of(columns, prompt="This is", **settings)[0] == {"text": "This is", "suffix": " yes"}
    template = rows_of(columns, text_column="q", prompt="Question: {text} {Answer}:", **settings)
    assert template[0] == {"text": "Question: A? {Answer}:", "suffix": " yes"}
    with pytest.raises(BrokenRow, match=r"Row 0 of the data: `--prompt` beside `--text_column` holds \{text\}"):
        rows_of(columns, text_column="q", prompt="This is", **settings)[0]


def test_some_rows_are_selected_by_their_numbers(photos):
    columns = {"image": photos[:2], "q": [["A?", "B?"], ["C?"]], "a": [["yes", "no"], ["both"]]}
    rows = rows_of(columns, text_column="q", suffix_column="a")
    chosen = rows.select([2, 1])
    assert [chosen.texts(index) for index in range(len(chosen))] == [rows.texts(2), rows.texts(1)]
    assert [chosen.name(index) for index in range(2)] == [rows.name(2), rows.name(1)]
    assert chosen.select([1])[0] == rows[1] and chosen.lengths() == [rows.lengths()[2], rows.lengths()[1]]
    plain = rows_of({"image": photos, "suffix": list("abcdef")}).select([5, 2])
    assert [plain[0]["suffix"], len(plain)] == ["f", 2]
    assert plain.__getitems__([0, 1]) == [plain[0]] and plain.broken == [f"Row 2 of the data ({photos[2]})"]


def test_lists_of_prompts_and_suffixes_are_one_row_for_each_pair(photos):
    columns = {"image": photos[:2], "q": [["A?", "B?"], ["C?"]], "a": [["yes", "no"], ["both"]]}
    settings = {"text_column": "q", "suffix_column": "a"}
    rows = rows_of(columns, **settings)
    assert [rows.texts(index) for index in range(len(rows))] == [
        ("A?", [" yes"]),
        ("B?", [" no"]),
        ("C?", [" both"]),
    ]
    assert rows[1]["image"].tobytes() == rows[0]["image"].tobytes() != rows[2]["image"].tobytes()
    assert rows.name(1) == f"Row 0 of the data ({photos[0]}), prompt 1"
    with pytest.raises(BrokenRow, match=r"Row 1 of the data .*, prompt 0: 1 of 'q' but \['both', 'none'\]"):
        rows_of(columns | {"a": [["yes", "no"], ["both", "none"]]}, **settings)[2]
    with pytest.raises(BrokenRow, match="0 of 'q' but"):
        rows_of(columns | {"q": [[], ["C?"]]}, **settings)[0]


def test_several_texts_of_an_image_come_together(photos):
    captions = rows_of({"image": photos[:2], "captions": CAPTIONS}, suffix_column="captions", texts_per_image=5)
    assert [sorted(captions[index]["suffix"]) for index in range(2)] == CAPTIONS and captions[0]["text"] == ["", ""]
    columns = {"image": photos[:1], "q": [["A?", "B?", "C?"]], "a": [[["yes", "yep"], ["no"], ["maybe"]]]}
    rows = rows_of(columns, text_column="q", suffix_column="a", texts_per_image=2)
    drawn = [tuple(zip(row["text"], row["suffix"], strict=True)) for row in (rows[0] for _ in range(50))]
    assert len(rows) == 1 and all(len(set(texts)) == 2 for texts in drawn)
    assert {pair for texts in drawn for pair in texts} == {
        ("A?", " yes"),
        ("A?", " yep"),
        ("B?", " no"),
        ("C?", " maybe"),
    }
    assert rows.lengths() == [len("C? maybe")]
    with pytest.raises(ValueError, match="`--texts_per_image` is at least 1, got 0"):
        rows_of(columns, text_column="q", suffix_column="a", texts_per_image=0)


def test_several_answers_for_each_of_several_prompts():
    columns = {"q": [["A?", "B?"]], "a": [[["yes", "yes"], ["no", "maybe"]]]}
    rows = rows_of(columns, text_column="q", suffix_column="a", image_column="none")
    assert rows.texts(1) == ("B?", [" no", " maybe"])


def test_classes_are_words():
    features = Features({"label": ClassLabel(names=["cat", "dog"])})
    rows = rows_of({"label": [1, 0]}, features=features, image_column="none", suffix_column="label")
    assert [rows[index]["suffix"] for index in range(2)] == ["dog", "cat"]
    numbers = {"image_column": "none", "suffix_column": "label"}
    assert rows_of({"label": [1, 0]}, **numbers)[0]["suffix"] == "1"
    assert rows_of({"label": [1, 0]}, class_names=["a", "b"], **numbers)[0]["suffix"] == "b"
    with pytest.raises(BrokenRow, match="class 2 in 'label', but there are 2 names"):
        rows_of({"label": [2]}, class_names=["a", "b"], **numbers)[0]


def test_several_images_in_a_row(photos):
    columns = {"image": [photos[:2], photos[4:]], "suffix": ["two", "others"]}
    row = rows_of(columns)[1]
    assert [image.tobytes() for image in row["images"]] == [picture(n).resize((64, 64)).tobytes() for n in (4, 5)]
    features = Features({"image": List(Image()), "suffix": Value("string")})
    embedded = rows_of({"image": [[picture(0), picture(1)]], "suffix": ["two"]}, features=features)
    assert embedded[0]["images"][1].tobytes() == picture(1).tobytes()


@pytest.mark.parametrize(
    ("text", "suffix", "expected"),
    [("", "dog", "dog"), ("A photo of", "dog", " dog"), ("A photo of ", "dog", "dog"), ("A photo of", " dog", " dog")],
)
def test_words_do_not_run_together(text, suffix, expected):
    assert separate(text, suffix) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_rows_are_named_left_out_and_counted_once(photos, workers, caplog):
    columns = {"image": [*photos, None, photos[0]], "suffix": ["ok"] * 7 + [None]}
    rows = rows_of(columns, max_broken=4)
    loader = DataLoader(rows, batch_size=2, num_workers=workers, collate_fn=list)
    for _ in range(3):
        batches = list(loader)
        # Of rows 2 and 3 nothing is left, so the next readable row, 4, stands in for them; likewise 0 for 6 and 7.
        assert [len(batch) for batch in batches] == [2, 1, 2, 1]
        assert batches[1][0]["image"].tobytes() == batches[2][0]["image"].tobytes()
    assert len(rows.broken) == 4
    assert rows.broken[0] == f"Row 2 of the data ({photos[2]})"
    if workers == 0:
        assert sum("Left out" in record.message for record in caplog.records) == 4
        assert "Row 3 of the data" in caplog.text and "no text in 'suffix', but None" in caplog.text


def test_too_many_broken_rows_stop_with_the_last_of_them(photos):
    rows = rows_of({"image": photos, "suffix": ["ok"] * 6}, max_broken=1)
    with pytest.raises(
        ValueError, match=r"2 broken rows of 6; the last: Row 3 of the data .*`--max_broken_rows` \(now 1"
    ):
        list(DataLoader(rows, batch_size=2, collate_fn=list))
    nothing = rows_of({"image": photos[2:4], "suffix": ["ok"] * 2})
    with pytest.raises(ValueError, match="2 broken rows of 2"):
        nothing.__getitems__([0, 1])


def test_augmentation_is_applied_to_upright_rgb(photos):
    seen = []
    rows = rows_of({"image": photos[:1], "suffix": ["x"]}, augment=lambda image: seen.append(image.mode) or "changed")
    assert rows[0]["image"] == "changed" and seen == ["RGB"]


def test_lengths_and_names_read_no_image(photos):
    rows = rows_of(
        {"image": photos[2:4], "q": ["Why?", ""], "a": [["no", "because"], ["x"]]}, text_column="q", suffix_column="a"
    )
    assert rows.lengths() == [len("Why? because"), 0]


def test_the_fingerprint_is_that_of_the_content(photos, tmp_path):
    def fingerprint(files, captions=CAPTIONS, **settings):
        return rows_of({"image": files, "captions": captions}, suffix_column="captions", **settings).fingerprint

    first = fingerprint(photos[:2])
    copy = tmp_path / "copy.png"
    shutil.copy(photos[0], copy)
    assert fingerprint([str(copy), photos[1]]) == first
    others = {fingerprint(photos[1::-1]), fingerprint(photos[:2], CAPTIONS[::-1]), fingerprint(photos[:2], prompt="A")}
    assert len(others - {first}) == 3
    assert fingerprint(photos[2:4])


def numbered(name, size):
    return rows_of({"suffix": [f"{name}{number}" for number in range(size)]}, image_column="none")


def test_a_mixture_without_weights_holds_every_row_once():
    mixture = Mixture({"a": numbered("a", 3), "b": numbered("b", 5)})
    assert sorted(mixture[index]["suffix"] for index in range(len(mixture))) == [f"a{n}" for n in range(3)] + [
        f"b{n}" for n in range(5)
    ]
    assert len(mixture.lengths()) == len(mixture) == 8


def test_weights_share_out_the_rows():
    mixture = Mixture({"a": numbered("a", 30), "b": numbered("b", 10)}, weights=[1, 3])
    assert mixture.counts == [10, 30]
    drawn = [[mixture[index]["suffix"] for index in range(len(mixture))] for _ in range(30)]
    for rows in drawn:
        assert len({row for row in rows if row[0] == "a"}) == 10  # none comes twice in a pass
        assert sorted(row for row in rows if row[0] == "b") == sorted([f"b{n}" for n in range(10)] * 3)
    assert {row for rows in drawn for row in rows if row[0] == "a"} == {f"a{n}" for n in range(30)}
    with pytest.raises(IndexError):
        mixture[40]


def test_a_mixture_leaves_out_broken_rows_and_names_them(photos):
    mixture = Mixture(
        {"good": numbered("a", 2), "bad": rows_of({"image": photos[2:4], "suffix": ["x"] * 2}, max_broken=5)}
    )
    assert [row["suffix"] for row in mixture.__getitems__([0, 2])] == ["a0"]
    assert mixture.broken == [f"Row 0 of the data ({photos[2]})"]


def test_every_source_of_a_mixture_has_its_own_count_of_broken_rows(photos):
    def parts(*files):
        return {
            str(n): rows_of({"image": own, "suffix": ["x"] * len(own)}, max_broken=1) for n, own in enumerate(files)
        }

    mixture = Mixture(parts(photos[1:3], photos[3:5]))
    assert len(mixture.__getitems__(range(4))) == 2 and len(mixture.broken) == 2
    with pytest.raises(ValueError, match="2 broken rows of 3; the last: Row 2 of"):
        Mixture(parts(photos[:1], photos[1:4])).__getitems__(range(4))


@pytest.mark.parametrize(("weights", "message"), [([1], "1 weights for 2"), ([1, 0], "weight of b .* got 0")])
def test_wrong_weights_are_named(weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture({"a": numbered("a", 1), "b": numbered("b", 1)}, weights)
    with pytest.raises(ValueError, match="at least one source"):
        Mixture({})


@pytest.fixture
def table(photos, tmp_path):
    columns = {"image": photos, "q": [["A?", "B?"]] * 6, "a": [["yes", "no"]] * 6}
    Dataset.from_dict(columns).to_parquet(tmp_path / "rows.parquet")
    return Source(str(tmp_path / "rows.parquet"), text_column="q", suffix_column="a", streaming=True)


def test_a_stream_has_the_rows_of_the_table(table, caplog):
    streamed = list(stream_rows(table, "train"))
    table.streaming = False
    rows = read_rows(table, "train")
    expected = [rows[index] for index in range(len(rows)) if index not in range(4, 8)]
    assert [(row["text"], row["suffix"]) for row in streamed] == [(row["text"], row["suffix"]) for row in expected]
    assert [row["image"].tobytes() for row in streamed] == [row["image"].tobytes() for row in expected]
    assert "Left out: Row 2 of" in caplog.text
    table.streaming = True
    together = list(stream_rows(table, "train", texts_per_image=2))
    assert len(together) == 4 and sorted(together[0]["suffix"]) == [" no", " yes"]
    with pytest.raises(ValueError, match="leave out `--streaming`"):
        read_rows(table, "train")


def test_a_stream_stops_at_too_many_broken_rows(table):
    with pytest.raises(ValueError, match="2 broken rows; the last: Row 3 of"):
        list(stream_rows(table, "train", max_broken=1))


def test_streams_are_mixed_by_weight_and_shared_by_processes(tmp_path):
    streams = {}
    for name, size in (("a", 40), ("b", 40)):
        for shard in range(2):
            (tmp_path / name).mkdir(exist_ok=True)
            Dataset.from_dict({"suffix": [f"{name}{shard}-{n}" for n in range(size)]}).to_parquet(
                tmp_path / name / f"train-{shard}-of-2.parquet"
            )
        streams[name] = stream_rows(Source(str(tmp_path / name), image_column="none", streaming=True), "train")
    rows = [row["suffix"] for row in StreamMixture(streams, [1, 4])]
    assert len(set(rows)) == 160  # all of both, some of b again
    assert [row[0] for row in rows[:100]].count("b") == pytest.approx(80, abs=15)
    mixture = DataLoader(StreamMixture(streams, [1, 1]), 4, num_workers=3, collate_fn=list)  # one finds no shard
    assert {row["suffix"] for batch in mixture for row in batch} == set(rows)
    loader = DataLoader(streams["a"], batch_size=4, num_workers=2, collate_fn=list)
    assert sorted(row["suffix"] for batch in loader for row in batch) == sorted(r["suffix"] for r in streams["a"])


def test_counters_are_shared_memory():
    assert numbered("a", 3)._broken.is_shared() and numbered("a", 3)._broken.dtype == torch.uint8


@pytest.mark.parametrize("mixed", [False, True])
def test_draws_of_an_epoch_depend_on_its_number_and_the_row_alone(photos, mixed):
    columns = {"image": [photos[0]] * 12, "captions": [list("abcdefghijklmnop")] * 12}
    settings = {"augment": augmentation((16, 16), {"auto_augment": "rand-m6"}), "suffix_column": "captions"}

    def epochs(numbers, workers, indices=range(12), seed=0):
        rows = rows_of(columns, seed=seed, **settings)
        rows = Mixture({"all": rows, "few": rows}, weights=[3, 1], seed=seed) if mixed else rows
        loader = DataLoader(rows, 4, sampler=list(indices), num_workers=workers, collate_fn=list)
        random.seed(workers)
        found = []
        for number in numbers:
            rows.set_epoch(number)
            found += [[(row["suffix"], row["image"].tobytes()) for batch in loader for row in batch]]
        return found

    first, second = epochs([0, 1], 0)
    assert first != second and len({suffix for suffix, _ in first}) > 3
    assert epochs([0, 1], 2) == [first, second]
    assert epochs([1], 0, indices=range(8, 12)) == [second[8:]]
    assert epochs([0], 0, seed=1) != [first]


def test_what_others_draw_is_not_changed(photos):
    rows = rows_of({"image": photos[:1], "captions": [["a", "b"]]}, suffix_column="captions")
    rows.set_epoch(0)
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    rows[0]
    assert states[0] == random.getstate() and torch.equal(states[1], torch.get_rng_state())
    assert states[2] == np.random.get_state()[1].tolist()


def test_a_stream_counts_a_broken_row_once_in_all_passes(table, caplog):
    rows = stream_rows(table, "train", max_broken=2)
    counts = {len(list(rows)) for _ in range(4)}
    assert len(counts) == 1 and caplog.text.count("Left out") <= 2


def test_a_stream_without_a_readable_row_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("image,caption\nnowhere.png,a dog\n")
    with pytest.raises(ValueError, match="has no row that could be read"):
        stream_rows(Source(str(tmp_path / "rows.csv"), suffix_column="caption", streaming=True), "train")


def test_a_mixture_of_streams_is_drawn_anew_in_every_epoch(tmp_path):
    for name in "ab":
        Dataset.from_dict({"word": [f"{name}{n}" for n in range(20)]}).to_json(tmp_path / f"{name}.jsonl")

    def stream(name):
        source = Source(str(tmp_path / f"{name}.jsonl"), image_column="none", suffix_column="word", streaming=True)
        return stream_rows(source, "train").shuffle(seed=0, buffer_size=20)

    mixture = StreamMixture({name: stream(name) for name in "ab"}, [1, 1])
    passes = []
    for epoch in (0, 1, 0):
        mixture.set_epoch(epoch)
        passes.append([row["suffix"] for row in mixture])
    assert passes[0] == passes[2] != passes[1]


def test_a_class_is_a_number_however_it_was_written():
    names = {"class_names": ["cat", "dog"], "suffix_column": "kind", "image_column": "none"}
    rows = rows_of({"kind": [0.0, 1.0, None]}, **names)
    assert [rows.texts(index)[1] for index in range(2)] == [["cat"], ["dog"]]
    for value in (-1.0, 2.0):
        with pytest.raises(BrokenRow, match="there are 2 names"):
            rows_of({"kind": [value]}, **names).texts(0)


@pytest.mark.parametrize("names", [None, ["cat", "dog"]])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), "   ", "\n", "", None, True])
def test_what_is_no_text_is_not_learnt(value, names):
    settings = {"image_column": "none", "suffix_column": "a", "class_names": names}
    with pytest.raises(BrokenRow, match="Row 0 of the data: no text in 'a', but"):
        rows_of({"a": [value]}, **settings).texts(0)
    if isinstance(value, str):
        with pytest.raises(BrokenRow, match="Row 0 of the data: no prompt in 'q', but"):
            rows_of({"q": [value], "a": ["cat"]}, text_column="q", **settings).texts(0)


@pytest.mark.parametrize("value", ["dog", "2", "-1", "0.5", "Cat"])
def test_what_is_neither_a_name_nor_the_number_of_one_is_not_learnt(value):
    names = {"class_names": ["cat", "bird"], "suffix_column": "kind", "image_column": "none"}
    rows = rows_of({"kind": [value, "cat", "0", "1"]}, **names)
    with pytest.raises(BrokenRow, match=f"class '{value}' in 'kind', but there are 2 names: cat, bird."):
        rows.texts(0)
    assert [rows.texts(index)[1] for index in (1, 2, 3)] == [["cat"], ["cat"], ["bird"]]
