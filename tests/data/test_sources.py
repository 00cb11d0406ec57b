"""Every kind of data set that people have is read, and what is missing is named."""

import json
import re
import tarfile

import pytest
from conftest import picture
from datasets import ClassLabel, Dataset, DatasetDict, Image

from imageprompt.data.rows import read_rows
from imageprompt.data.sources import Source, load

CAPTIONS = ["A dog.", "A cat.", "A red sofa.", "Two birds."]


@pytest.fixture
def photos(tmp_path):
    """A folder with four images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        picture(number).save(folder / f"{number}.png")
    return folder


def rows_of(*args, split="train", **settings):
    return read_rows(Source(*args, **settings), split, draw=False)


def assert_reads_the_photos(rows, prompts=("",) * 4):
    assert [rows.texts(index) for index in range(len(rows))] == [
        (prompt, [f"{' ' if prompt else ''}{caption}"]) for prompt, caption in zip(prompts, CAPTIONS, strict=True)
    ]
    for index in range(4):
        assert rows[index]["image"].convert("RGB").tobytes() == picture(index).tobytes()


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize("names_folder", [True, False], ids=["folder", "file"])
def test_a_table_beside_images(photos, suffix, names_folder):
    data = Dataset.from_dict({"file": [f"{number}.png" for number in range(4)], "caption": CAPTIONS})
    table = photos / f"captions{suffix}"
    if suffix == ".parquet":
        data.to_parquet(table)
    elif suffix in (".json", ".jsonl"):
        data.to_json(table)
    else:
        data.to_csv(table, sep="\t" if suffix == ".tsv" else ",", index=False)
    rows = rows_of(str(photos if names_folder else table), image_column="file", suffix_column="caption")
    assert_reads_the_photos(rows)
    assert rows.name(2) == f"Row 2 of {photos if names_folder else table} (2.png)"


def test_a_json_list(photos):
    entries = [{"file": f"{number}.png", "caption": caption} for number, caption in enumerate(CAPTIONS)]
    (photos / "captions.json").write_text(json.dumps(entries))
    assert_reads_the_photos(rows_of(str(photos), image_column="file", suffix_column="caption"))


def test_paths_start_where_the_option_says(photos, tmp_path):
    table = tmp_path / "captions.csv"
    Dataset.from_dict({"image": [f"{number}.png" for number in range(4)], "caption": CAPTIONS}).to_csv(table)
    assert_reads_the_photos(rows_of(str(table), suffix_column="caption", image_folder=str(photos)))


def test_a_folder_as_datasets_lays_it_out(photos):
    lines = [json.dumps({"file_name": f"{n}.png", "caption": caption}) for n, caption in enumerate(CAPTIONS)]
    (photos / "metadata.jsonl").write_text("\n".join(lines))
    assert_reads_the_photos(rows_of(str(photos), suffix_column="caption"))


def test_a_folder_for_each_class(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        picture(len(name)).save(tmp_path / "train" / name / "a.png")
    rows = rows_of(str(tmp_path), suffix_column="label", prompt="This is a")
    assert rows.class_names == ["cat", "dog"]
    assert [rows.texts(index) for index in range(2)] == [("This is a", [" cat"]), ("This is a", [" dog"])]
    words = rows_of(str(tmp_path), suffix_column="label", class_names=["feline", "canine"])
    assert words[1]["suffix"] == "canine"
    with pytest.raises(ValueError, match="3 words for the 2 classes"):
        rows_of(str(tmp_path), suffix_column="label", class_names=["a", "b", "c"])


def test_what_save_to_disk_wrote(tmp_path):
    data = Dataset.from_dict({"image": [picture(n) for n in range(4)], "suffix": CAPTIONS}).cast_column(
        "image", Image()
    )
    data.save_to_disk(tmp_path / "one")
    DatasetDict(test=data).save_to_disk(tmp_path / "several")
    assert_reads_the_photos(rows_of(str(tmp_path / "one")))
    assert_reads_the_photos(rows_of(str(tmp_path / "several"), split="test"))


def test_a_webdataset(photos, tmp_path):
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for number, caption in enumerate(CAPTIONS):
            (photos / f"{number}.txt").write_text(caption)
            for suffix in ("png", "txt"):
                tar.add(photos / f"{number}.{suffix}", f"{number}.{suffix}")
    assert_reads_the_photos(rows_of(str(tmp_path / "shard.tar"), image_column="png", suffix_column="txt"))


def test_plain_text(tmp_path):
    (tmp_path / "book.txt").write_text("First line.\nSecond line.\n")
    rows = rows_of(str(tmp_path / "book.txt"), image_column="none", suffix_column="text", prompt="<|endoftext|>")
    assert rows[1] == {"text": "<|endoftext|>", "suffix": " Second line."}


def test_coco_captions(photos):
    images = [{"id": 10 + n, "file_name": f"{n}.png"} for n in range(4)]
    annotations = [{"image_id": 10 + n, "caption": text} for n in (1, 0, 2, 3) for text in (CAPTIONS[n], "Again.")]
    (photos / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    rows = rows_of(str(photos / "captions.json"), suffix_column="captions")
    assert rows.texts(0) == ("", ["A cat.", "Again."])
    assert rows[0]["image"].tobytes() == picture(1).tobytes()


def test_karpathys_splits(photos):
    images = [
        {"filename": f"{n}.png", "filepath": "", "split": split, "sentences": [{"raw": text}]}
        for n, (split, text) in enumerate(zip(("train", "restval", "val", "test"), CAPTIONS, strict=True))
    ]
    (photos / "dataset.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    settings = {"dataset": str(photos / "dataset.json"), "suffix_column": "captions"}
    assert [rows_of(split="train+restval", **settings).texts(n)[1][0] for n in range(2)] == CAPTIONS[:2]
    assert rows_of(split="validation", **settings)[0]["image"].tobytes() == picture(2).tobytes()


def test_vqa(photos, tmp_path):
    (photos / "0.png").rename(photos / "COCO_val2014_000000000042.png")
    questions = [{"question_id": 420, "image_id": 42, "question": "What is it?"}]
    answers = [{"answer": answer, "answer_id": n} for n, answer in enumerate(["dog"] * 7 + ["puppy"] * 3)]
    annotation = {"question_id": 420, "image_id": 42, "multiple_choice_answer": "dog", "answers": answers}
    (tmp_path / "questions.json").write_text(json.dumps({"questions": questions}))
    (tmp_path / "annotations.json").write_text(json.dumps({"annotations": [annotation]}))
    settings = {
        "dataset": str(tmp_path / "questions.json"),
        "text_column": "question",
        "prompt": "Question: {text} Answer:",
        "image_folder": str(photos),
    }
    rows = rows_of(suffix_column="answers", annotations=str(tmp_path / "annotations.json"), **settings)
    assert rows.texts(0) == ("Question: What is it? Answer:", [" dog"] * 7 + [" puppy"] * 3)
    assert rows[0]["image"].tobytes() == picture(0).tobytes()
    with pytest.raises(ValueError, match="no column 'answers'; it has question_id, image_id, question, image"):
        rows_of(suffix_column="answers", **settings)


def test_parts_and_sums_of_splits(photos):
    data = Dataset.from_dict({"image": [f"{number}.png" for number in range(4)], "caption": CAPTIONS})
    data.to_csv(photos / "captions.csv")
    source = {"dataset": str(photos), "suffix_column": "caption"}

    def captions(split, **settings):
        rows = rows_of(split=split, **source, **settings)
        return [rows.texts(index)[1][0] for index in range(len(rows))]

    assert captions("train[:50%]") == CAPTIONS[:2]
    assert captions("train[50%:]+train[:1]") == [*CAPTIONS[2:], CAPTIONS[0]]
    first, second = captions("train[:2]", shuffle_rows=3), captions("train[2:]", shuffle_rows=3)
    assert sorted(first + second) == sorted(CAPTIONS) and first != CAPTIONS[:2]
    for split in ("test", "train[50%"):
        with pytest.raises(
            ValueError, match=r'has no split .*; it has train. A part of one is cut like "train\[:80%\]"'
        ):
            captions(split)
    with pytest.raises(ValueError, match="is empty"):
        captions("train[:0]")


def test_what_is_not_there_is_named(photos, tmp_path):
    with pytest.raises(ValueError, match="Which data"):
        rows_of()
    for missing in (str(tmp_path / "nowhere"), "nowhere.csv"):
        with pytest.raises(ValueError, match="There is no data set at"):
            rows_of(missing)
    (tmp_path / "rows.xlsx").write_text("")
    with pytest.raises(ValueError, match=r"of no kind that can be read; those are .*\.csv"):
        rows_of(str(tmp_path / "rows.xlsx"))
    Dataset.from_dict({"photo": ["0.png"], "caption": ["A dog."]}).to_csv(photos / "captions.csv", index=False)
    with pytest.raises(ValueError, match="has no column 'suffix'; it has photo, caption"):
        rows_of(str(photos))
    with pytest.raises(ValueError, match="has no column 'image'; it has photo, caption"):
        rows_of(str(photos), suffix_column="caption")


def test_streams_have_the_same_columns_and_no_parts(photos):
    Dataset.from_dict({"image": ["0.png"], "caption": ["A dog."]}).to_csv(photos / "captions.csv", index=False)
    source = Source(str(photos), suffix_column="caption", streaming=True)
    assert next(iter(load(source, "train")))["caption"] == "A dog."
    with pytest.raises(ValueError, match="leave out `--streaming`"):
        load(source, "train[:50%]")
    with pytest.raises(ValueError, match="has no column 'text'; it has image, caption"):
        load(Source(str(photos), suffix_column="text", streaming=True), "train")


def repeated(photos, kind="csv", **settings):
    """Two captions a row of its own for each of four images, which are named or held in the way of that kind."""
    files, captions = [f"{number}.png" for number in range(4)] * 2, ["A dog."] * 4 + ["One dog."] * 4
    rows = [{"image": file, "caption": caption} for file, caption in zip(files, captions, strict=True)]
    table = photos / {"csv": "captions.csv", "folder": "metadata.csv", "held": "rows.parquet"}.get(kind, "rows.json")
    if kind == "csv":
        Dataset.from_list(rows).to_csv(table, index=False)
    elif kind == "folder":
        Dataset.from_list(rows).rename_column("image", "file_name").to_csv(table, index=False)
    elif kind == "held":
        held = Dataset.from_list(rows).map(lambda row: {"image": (photos / row["image"]).read_bytes()})
        held.cast_column("image", Image()).to_parquet(table)
    else:  # the second images are in one row with a third one, so that all three belong together
        lists = [[file] for file in files[:4]] + [["0.png"], ["1.png"], ["2.png", "3.png"], ["3.png"]]
        table.write_text(json.dumps([row | {"image": list} for row, list in zip(rows, lists, strict=True)]))
    return {"dataset": str(photos), "suffix_column": "caption"} | settings


def pictures_of(rows):
    """The pixels of all images of all rows."""
    found = [rows[index] for index in range(len(rows))]
    images = [row["images"] if "images" in row else [row["image"]] for row in found]
    return {image.convert("RGB").tobytes() for of_row in images for image in of_row}


@pytest.mark.parametrize("kind", ["csv", "folder", "held"])
@pytest.mark.parametrize("join_rows", [False, True])
@pytest.mark.parametrize("shuffle_rows", [None, 0, 1])
def test_the_rows_of_an_image_are_never_on_both_sides_of_a_cut(photos, shuffle_rows, join_rows, kind, caplog):
    source = repeated(photos, kind, shuffle_rows=shuffle_rows, join_rows=join_rows)
    parts = [rows_of(split=split, **source) for split in ("train[:75%]", "train[75%:]")]
    pictures = [pictures_of(rows) for rows in parts]
    assert not pictures[0] & pictures[1] and [len(each) for each in pictures] == [3, 1]
    assert [len(rows) for rows in parts] == ([3, 1] if join_rows else [6, 2])


@pytest.mark.parametrize("shuffle_rows", [None, 0, 1])
def test_rows_of_several_images_are_on_one_side_with_all_that_share_some(photos, shuffle_rows):
    source = repeated(photos, "lists", shuffle_rows=shuffle_rows)
    parts = [rows_of(split=split, **source) for split in ("train[:67%]", "train[67%:]")]
    pictures = [pictures_of(rows) for rows in parts]
    assert not pictures[0] & pictures[1] and sorted(len(each) for each in pictures) in ([1, 3], [2, 2])
    assert sum(len(rows) for rows in parts) == 8
    joined = rows_of(**source | {"join_rows": True})
    assert sorted(len(joined.texts(index)[1]) for index in range(len(joined))) == [1, 1, 2, 2, 2]


@pytest.mark.parametrize("kind", ["csv", "folder", "held"])
def test_joined_rows_have_all_texts_of_their_image(photos, kind):
    rows = rows_of(**repeated(photos, kind, join_rows=True))
    assert len(rows) == 4 and rows.texts(3) == ("", ["A dog.", "One dog."])
    assert rows[3]["image"].convert("RGB").tobytes() == picture(3).tobytes()


def test_rows_are_not_joined_where_images_are_not_known(photos):
    with pytest.raises(ValueError, match="leave out `--join_rows`"):
        load(Source(**repeated(photos, join_rows=True, streaming=True)), "train")
    with pytest.raises(
        ValueError, match="joined by their images: leave out `--join_rows`, or name an `--image_column`"
    ):
        rows_of(**repeated(photos, join_rows=True, image_column="none"))
    with pytest.raises(ValueError, match="has no column 'text'"):
        rows_of(**repeated(photos, join_rows=True) | {"suffix_column": "text"})


def test_joined_questions_are_pairs_with_their_answers(photos):
    lines = [f"{number}.png,What {kind}?,{kind} {number}" for kind in ("colour", "shape") for number in range(2)]
    (photos / "questions.csv").write_text("\n".join(["image,question,answer", *lines]) + "\n")
    rows = rows_of(str(photos), text_column="question", suffix_column="answer", join_rows=True)
    texts = [rows.texts(index) for index in range(len(rows))]
    assert texts == [(f"What {kind}?", [f" {kind} {n}"]) for n in range(2) for kind in ("colour", "shape")]


def test_several_texts_of_classes_and_lists_are_joined(photos):
    files = ["0.png", "1.png", "0.png"]
    Dataset.from_dict({"image": files, "captions": [["a", "b"], ["c"], ["d"]]}).to_parquet(photos / "rows.parquet")
    assert rows_of(str(photos), suffix_column="captions", join_rows=True).texts(0) == ("", ["a", "b", "d"])
    questions = {"q": [["A?", "B?"], ["C?"], ["D?"]], "a": [["1", "2"], ["3"], ["4"]]}
    Dataset.from_dict({"image": files, **questions}).to_parquet(photos / "rows.parquet")
    rows = rows_of(str(photos), text_column="q", suffix_column="a", join_rows=True)
    assert [rows.texts(index)[0] for index in range(4)] == ["A?", "B?", "D?", "C?"]
    kinds = Dataset.from_dict({"image": files, "kind": [1, 0, 1]}).cast_column("kind", ClassLabel(names=["cat", "dog"]))
    kinds.to_parquet(photos / "rows.parquet")
    assert rows_of(str(photos), suffix_column="kind", join_rows=True).texts(0) == ("", ["dog", "dog"])


def test_tables_are_read_as_they_are_written(photos):
    words = ["007", "None", "True", "1.50", "NA"]
    (photos / "words.csv").write_text("\n".join(["image;word", *(f"0.png;{word}" for word in words)]))
    rows = rows_of(str(photos), suffix_column="word")
    assert [rows.texts(index)[1] for index in range(5)] == [[word] for word in words]


@pytest.mark.parametrize("values", [["0", "1", "0"], ["0", "", "1"]])
def test_numbers_in_tables_are_classes_where_there_are_names(photos, values, caplog):
    (photos / "classes.csv").write_text(
        "\n".join(["image,kind", *(f"{n}.png,{value}" for n, value in enumerate(values))])
    )
    rows = rows_of(str(photos), suffix_column="kind", class_names=["cat", "dog"])
    found = [rows.texts(index)[1][0] for index in range(3) if values[index]]
    assert found == [["cat", "dog"][int(value)] for value in values if value]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "captions.csv has no rows"),
        ("image,caption\n", "captions.csv has no rows"),
        (
            "image,caption\n0.png,A dog.\n1.png,A dog, running.\n",
            r"line 3: 3 cells, but 2 columns \(image, caption\). Put",
        ),
        ("image,caption\n0.png,A dog, running.\n", "line 2: 3 cells"),
        (
            "image,caption\n0.png,Un château.\n".encode("latin-1"),
            r"cannot be read: .*byte 0xe2.*Write the table as UTF-8",
        ),
    ],
)
def test_what_is_wrong_with_a_table_is_said_with_its_line(photos, content, message):
    (photos / "captions.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        rows_of(str(photos), suffix_column="caption")


def test_a_mark_of_the_byte_order_is_no_part_of_a_name(photos):
    (photos / "captions.csv").write_text("image,caption\n0.png,A dog.\n", encoding="utf-8-sig")
    assert rows_of(str(photos), suffix_column="caption").texts(0) == ("", ["A dog."])


IMAGES = [{"id": 1, "file_name": "0.png"}]
BROKEN = {
    "COCO's boxes": (
        {"images": IMAGES, "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]},
        "an object without caption; it has only image_id, bbox. COCO's captions are in captions_",
    ),
    "COCO's images": (
        {"images": [{"id": 1, "name": "0.png"}], "annotations": [{"image_id": 1, "caption": "A dog."}]},
        "an object without file_name; it has only id, name.",
    ),
    "COCO without captions": ({"images": IMAGES, "annotations": []}, "has no captions of its images"),
    "Karpathy without splits": (
        {"images": [{"filename": "0.png", "sentences": [{"raw": "A dog."}]}]},
        "an object without split; it has only filename, sentences.",
    ),
    "Karpathy with texts": (
        {"images": [{"filename": "0.png", "split": "train", "sentences": ["A dog."]}]},
        "an object without raw; it is 'A dog.'.",
    ),
    "own questions": (
        {"questions": [{"id": 1, "image": "0.png", "question": "What?", "answer": "A dog."}]},
        "an object without question_id, image_id; it has only id, image, question, answer. A table of your own",
    ),
    "no list": ([], "has no rows"),
    "no object": ({}, "has no rows"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=list(BROKEN))
def test_what_a_json_file_lacks_is_said(photos, content, message):
    file = photos / "rows.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}:? {re.escape(message)}"):
        rows_of(str(photos), suffix_column="captions")


def test_questions_are_no_answers(photos):
    questions = {"questions": [{"question_id": 420, "image_id": 0, "question": "What is it?"}]}
    (photos / "questions.json").write_text(json.dumps(questions))
    for answers, message in (
        (questions, "an object without annotations; it has only questions. `--annotations` names the file of answers"),
        (
            {"annotations": [{"question_id": 420, "answers": [{"text": "dog"}]}]},
            "an object without answer; it has only",
        ),
        ("broken", "an object without annotations; it is 'broken'"),
    ):
        (photos / "answers.json").write_text(json.dumps(answers))
        settings = {"annotations": str(photos / "answers.json"), "text_column": "question", "suffix_column": "answer"}
        with pytest.raises(ValueError, match=f"answers.json: {message}"):
            rows_of(str(photos / "questions.json"), **settings)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b"", "has no rows"),
        ("rows.json", b"\n\n", "has no rows"),
        ("rows.txt", b"", "has no rows"),
        ("rows.jsonl", b'{"caption": ', "cannot be read: "),
        ("rows.json", b'{"caption": "\xff', "cannot be read: "),
        ("rows.parquet", b"no parquet", "cannot be read: .*[Pp]arquet"),
        ("rows.tar", b"no tar", "cannot be read: "),
    ],
)
def test_data_that_cannot_be_read_is_named(photos, name, content, message, streaming):
    (photos / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} {message}"):
        load(Source(str(photos / name), suffix_column="caption", streaming=streaming), "train")
