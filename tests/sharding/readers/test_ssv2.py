import argparse
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from vidcls.sharding.readers.ssv2 import add_arguments, read, read_ssv2
from vidcls.sharding.records import RecordError

# Not in the order of their indices, and not in that of the alphabet.
LABELS = {"Tearing something": "1", "Closing something": "0", "Something falling like a rock": "2"}
ROWS = [
    {"id": "42", "label": "a rock falls", "template": "[Something] falling like a rock", "placeholders": ["a rock"]},
    {"id": "7", "label": "closing a box", "template": "Closing [something]", "placeholders": ["a box"]},
]
ANSWERS = "7;Closing something\n42;Something falling like a rock\n99;Tearing something\n"


def read_rows(folder: Path, rows: Any, answers: str | None = None, labels: Any = LABELS, **options: Any):
    (folder / "list.json").write_text(json.dumps(rows))
    (folder / "labels.json").write_text(json.dumps(labels))
    if answers is not None:
        (folder / "answers.csv").write_bytes(answers.encode())
        options["answers_file"] = folder / "answers.csv"
    return read_ssv2(folder / "videos", folder / "list.json", folder / "labels.json", **options)


def test_list(tmp_path: Path) -> None:
    labels, records = read_rows(tmp_path, ROWS)
    assert labels.names == ("Closing something", "Tearing something", "Something falling like a rock")
    assert [(record.key, record.label, record.class_name) for record in records] == [
        ("42", 2, "Something falling like a rock"),
        ("7", 0, "Closing something"),
    ]
    assert (records[0].path, records[0].source) == (tmp_path / "videos" / "42.webm", "42.webm")
    assert records[0].prompt is None


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_test_list_takes_its_templates_from_the_answers(tmp_path: Path, end: str) -> None:
    answers = "\ufeff" + ANSWERS.replace("\n", end).replace("Closing something", "Closing [something]")
    _, records = read_rows(tmp_path, [{"id": "42"}, {"id": "7"}], answers)
    assert records == read_rows(tmp_path, ROWS)[1]


def test_test_list_without_answers_says_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"list.json: row 1: has no template: .*--answers test-answers\.csv"):
        read_rows(tmp_path, [{"id": "42"}])


def test_suffix(tmp_path: Path) -> None:
    assert read_rows(tmp_path, ROWS, suffix=".mp4")[1][0].path.name == "42.mp4"
    with pytest.raises(RecordError, match="suffix = 'mp4'"):
        read_rows(tmp_path, ROWS, suffix="mp4")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "1", "template": "Eating [something]"}, "class 'Eating something' is unknown"),
        ({"id": "1", "template": 3}, "template = 3: must be text"),
        ({"template": "Closing [something]"}, "has no id"),
        ({"id": "42", "template": "Closing [something]"}, "id 42 is also that of row 1"),
        ({"id": "../1", "template": "Closing [something]"}, r"id = '\.\./1': must be digits"),
        ({"id": "", "template": "Closing [something]"}, "id = '': must be digits"),
        ({"id": "١", "template": "Closing [something]"}, "must be digits"),
        ({"id": 1, "template": "Closing [something]"}, "id = 1: must be digits, as text"),
        ("1", "must be an object"),
        ({"id": "1"}, r"answers\.csv has no answer for id 1"),
    ],
)
def test_wrong_row_is_named(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(RecordError, match=rf"list\.json: row 3: .*{message}"):
        read_rows(tmp_path, [*ROWS, row], ANSWERS)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("7;Closing something", r"id 7 is also that of .*answers\.csv:1"),
        ("8 Closing something", 'must be "id;template"'),
        ("id;Closing something", 'must be "id;template"'),
        ("1;Eating something", "class 'Eating something' is unknown"),
    ],
)
def test_wrong_answer_names_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(RecordError, match=rf"answers\.csv:4: .*{message}"):
        read_rows(tmp_path, [{"id": "1"}], f"{ANSWERS}{line}\n")


@pytest.mark.parametrize("rows", [{}, [], "x", None])
def test_file_that_is_no_list(tmp_path: Path, rows: Any) -> None:
    with pytest.raises(RecordError, match=r"list\.json: must be a JSON list"):
        read_rows(tmp_path, rows)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "must be a JSON object"),
        ({}, "must be a JSON object"),
        ({"a": "0", "b": "2"}, "no template has index 1"),
        ({"a": "1"}, "no template has index 0"),
        ({"a": "0", "b": "0"}, "'b' and 'a' both have index 0"),
        ({"a": "-1"}, "'a' has index '-1'"),
        ({"a": True}, "'a' has index True"),
        ({" ": 0}, "not blank"),
    ],
)
def test_wrong_labels(tmp_path: Path, labels: Any, message: str) -> None:
    with pytest.raises(RecordError, match=rf"labels\.json: .*{message}"):
        read_rows(tmp_path, ROWS, labels=labels)


def read_official(folder: Path, name: str, *more: str):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    labels = str(folder / "something-something-v2-labels.json")
    return read(parser.parse_args(["--videos", "v", "--list", str(folder / name), "--labels", labels, *more]))


@pytest.mark.real
def test_official_validation_list(real_data: Path) -> None:
    """Against classes found another way: by searching the text of labels.json for each template as a line."""
    folder = real_data / "ssv2" / "annotations"
    labels, records = read_official(folder, "something-something-v2-validation.json")
    assert (len(labels), len(records)) == (174, 24777)
    assert len({record.key for record in records}) == 24777
    for left, right in ((86, 87), (93, 94), (166, 167)):  # the only classes that a mirror swaps
        swapped = {"left": "right", "right": "left"}
        words = [swapped.get(word, word) for word in labels.names[left].split()]
        assert " ".join(words) == labels.names[right] != labels.names[left]
    index_of = {
        line.split('":"')[0].strip(' "'): int(re.findall(r'"(\d+)"', line)[-1])
        for line in (folder / "something-something-v2-labels.json").read_text().splitlines()
        if '":"' in line
    }
    texts = re.findall(
        r'"id":"(\d+)".*?"template":"(.*?)","placeholders"',
        (folder / "something-something-v2-validation.json").read_text(),
    )
    expected = [(clip, index_of[re.sub(r"[\[\]]", "", template)]) for clip, template in texts]
    assert [(record.key, record.label) for record in records] == expected
    assert len(Counter(label for _, label in expected)) == 174


@pytest.mark.real
def test_official_test_list(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "ssv2" / "annotations"
    name = "something-something-v2-test.json"
    with pytest.raises(RecordError, match=r"row 1: has no template: a test list needs"):
        read_official(folder, name)
    ids = re.findall(r"\d+", (folder / name).read_text())
    (tmp_path / "answers.csv").write_text("".join(f"{clip};Closing something\n" for clip in reversed(ids)))
    _, records = read_official(folder, name, "--answers", str(tmp_path / "answers.csv"))
    assert [record.key for record in records] == ids
    assert {record.label for record in records} == {5}


@pytest.mark.real
def test_lists_of_the_clips_at_hand(real_data: Path) -> None:
    folder = real_data / "ssv2" / "annotations"
    for name, count in (("subset_train.json", 11), ("subset_validation.json", 2)):
        _, records = read_official(folder, name)
        assert len(records) == count
        assert all((real_data / "ssv2" / "videos" / record.source).is_file() for record in records)
