import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from vidcls.data.labels import LabelSpace
from vidcls.sharding.readers.sharegpt import add_arguments, numbered_classes, read, read_dataset_info, read_sharegpt
from vidcls.sharding.records import RecordError

ASK = "<video>What is the action? <ACTION>"
LABELS = LabelSpace(("walk", "run", "fly"))


def row(video: str = "v/a.mp4", label: Any = 1, prompt: str = ASK, answer: str | None = "Run.") -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages, "videos": [video], "action_label": label}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "v").mkdir()
    for name in "abc":
        (tmp_path / "v" / f"{name}.mp4").touch()
    (tmp_path / "classes.txt").write_bytes(b"walk\r\nrun\r\nfly\r\n")
    return tmp_path


def write(folder: Path, rows: list[Any], end: str = "\n", lines: bool = False) -> Path:
    """A list as people indent it, or one row per line, with the line ends `end`."""
    file = folder / ("data.jsonl" if lines else "data.json")
    text = "\n".join(map(json.dumps, rows)) + "\n" if lines else json.dumps(rows, indent=2)
    file.write_bytes(text.replace("\n", end).encode())
    return file


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r\n\r\n"])
def test_list_and_lines(folder: Path, end: str, lines: bool) -> None:
    system = {"role": "system", "content": "Look."}
    second = row("v/b.mp4", 0, "<video>\nAnd this?\n<ACTION>\n", None)
    second["messages"].insert(0, system)
    records = read_sharegpt(write(folder, [row(), second], end, lines), LABELS)
    assert [(record.key, record.label, record.class_name, record.prompt, record.answer) for record in records] == [
        ("v_a", 1, "run", ASK, "Run."),
        ("v_b", 0, "walk", "<video>\nAnd this?\n<ACTION>\n", None),
    ]
    assert (records[0].path, records[0].source) == (folder / "v/a.mp4", "v/a.mp4")


def test_one_video_with_several_questions(folder: Path) -> None:
    other = "<video>Again? <ACTION>"
    rows = [row(), row(prompt=other), row("v/b.mp4"), row(answer=None)]
    records = read_sharegpt(write(folder, rows), LABELS)
    keys = [record.key for record in records]
    assert len(set(keys)) == 4
    assert keys[2] == "v_b"
    assert all(key.startswith("v_a_") for key in keys[:2] + keys[3:])
    turned = read_sharegpt(write(folder, rows[::-1]), LABELS)
    assert sorted((record.key, record.prompt, record.answer or "") for record in turned) == sorted(
        (record.key, record.prompt, record.answer or "") for record in records
    )


def without(field: str) -> dict[str, Any]:
    return {name: value for name, value in row().items() if name != field}


def saying(*turns: tuple[Any, Any]) -> dict[str, Any]:
    return {**row(), "messages": [{"role": role, "content": text} for role, text in turns]}


VIOLATIONS: list[tuple[Any, str]] = [
    (row(prompt="<video>What?"), "has 1 <video> and 0 <ACTION>"),
    (row(prompt=f"{ASK}<ACTION>"), "has 1 <video> and 2 <ACTION>"),
    (row(prompt=f"{ASK} please"), "text behind <ACTION>, which must end it: 'please'"),
    (row(prompt="<ACTION><video>"), "<ACTION> before <video>"),
    (row(prompt="What? <ACTION>"), "has 0 <video> and 1 <ACTION>"),
    (row(answer="It is <ACTION>"), "answer 'It is <ACTION>' has <ACTION>"),
    ({**row(), "videos": []}, "videos = []: must be a list of exactly one path"),
    ({**row(), "videos": ["v/a.mp4", "v/b.mp4"]}, "must be a list of exactly one path"),
    ({**row(), "videos": "v/a.mp4"}, "must be a list of exactly one path"),
    ({**row(), "videos": [None]}, "must be a list of exactly one path"),
    (without("videos"), "videos = None: must be a list"),
    (row("v/none.mp4"), "v/none.mp4 is missing"),
    (row("v"), "v is missing"),
    (row("x" * 5000), "is missing"),
    (row(label=3), "action_label = 3: must be an integer from 0 to 2"),
    (row(label=-1), "action_label = -1: must be"),
    (row(label=True), "action_label = True: must be"),
    (row(label=1.0), "action_label = 1.0: must be"),
    (row(label="1"), "action_label = '1': must be"),
    (without("action_label"), "action_label = None: must be"),
    ([], "must be an object with messages, videos and action_label"),
    ("x", "must be an object"),
    (None, "must be an object"),
    (without("messages"), "messages must be a list of messages"),
    ({**row(), "messages": ["x"]}, "message 1: role = None: unknown role; known are user, assistant and system"),
    (saying(("human", ASK)), "message 1: role = 'human': unknown role"),
    (saying(("user", ASK), (["gpt"], "x")), "message 2: role = ['gpt']: unknown role"),
    (saying(("user", [ASK])), "message 1: content = ['<video>What is the action? <ACTION>']: must be text"),
    (saying(), "messages of nobody: must be one of user, then at most one of assistant"),
    (saying(("assistant", "x"), ("user", ASK)), "messages of assistant, user: must be one"),
    (saying(("user", ASK), ("assistant", "x"), ("user", "y")), "messages of user, assistant, user: must be one"),
]


@pytest.mark.parametrize(("wrong", "message"), VIOLATIONS)
@pytest.mark.parametrize("lines", [False, True])
def test_violation_is_listed_with_its_row(folder: Path, wrong: Any, message: str, lines: bool) -> None:
    rows = [row(), row("v/b.mp4"), wrong, row("v/c.mp4")]
    with pytest.raises(RecordError) as caught:
        read_sharegpt(write(folder, rows, lines=lines), LABELS)
    first, second = str(caught.value).split("\n")
    assert first.endswith(": 1 violations:")
    assert second.startswith("  row 3: ")
    assert message in second


def test_all_violations_are_listed_and_counted(folder: Path) -> None:
    wrong = {"messages": [{"role": "user", "content": "<video>"}], "videos": [], "action_label": 9}
    with pytest.raises(RecordError) as caught:
        read_sharegpt(write(folder, [wrong, row(), *[wrong] * 7]), LABELS)
    head, *listed = str(caught.value).split("\n")
    assert head.endswith("data.json: 24 violations:")
    assert len(listed) == 21
    assert listed[-1].strip() == "and 4 more"
    assert [line.split(":")[0].strip() for line in listed[:6]] == ["row 1"] * 3 + ["row 3"] * 3


def test_row_that_is_there_twice(folder: Path) -> None:
    with pytest.raises(RecordError, match="row 3: the same video, prompt, answer and label as row 1"):
        read_sharegpt(write(folder, [row(), row(label=0), row()]), LABELS)


def test_line_that_is_not_json_is_one_violation_among_others(folder: Path) -> None:
    file = folder / "data.jsonl"
    file.write_text(f"{json.dumps(row())}\n\n{{oops\n{json.dumps(row(label=7))}\n")
    with pytest.raises(RecordError, match=r"2 violations:\n  row 3: is not JSON.*\n  row 4: action_label = 7"):
        read_sharegpt(file, LABELS)


@pytest.mark.parametrize(("text", "message"), [("[]", "lists no clips"), ("", "lists no clips"), ("[{}", "not JSON")])
def test_file_that_cannot_be_used(folder: Path, text: str, message: str) -> None:
    (folder / "data.json").write_text(text)
    with pytest.raises(RecordError, match=rf"data\.json: .*{message}"):
        read_sharegpt(folder / "data.json", LABELS)


def test_classes_without_names_sort_in_label_order() -> None:
    assert numbered_classes(2).names == ("class 0", "class 1")
    assert numbered_classes(10).names[9] == "class 9"
    names = numbered_classes(11).names
    assert (names[0], names[10], list(names)) == ("class 00", "class 10", sorted(names))
    with pytest.raises(RecordError, match="num_classes = 0: must be at least 1"):
        numbered_classes(0)


def with_options(*options: object):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return read(parser.parse_args([str(option) for option in options]))


def test_options(folder: Path) -> None:
    file = write(folder, [row()])
    labels, records = with_options("--json", file, "--classes", folder / "classes.txt")
    assert (labels, records) == (LABELS, read_sharegpt(file, LABELS))
    (folder / "else").mkdir()
    moved = write(folder / "else", [row()])
    labels, records = with_options("--json", moved, "--num-classes", 2, "--videos", folder)
    assert (labels.names, records[0].path) == (("class 0", "class 1"), folder / "v/a.mp4")
    with pytest.raises(RecordError, match=r"else/v/a\.mp4 is missing"):
        with_options("--json", moved, "--num-classes", 2)
    with pytest.raises(RecordError, match="dataset = 'x': goes with --dataset-info"):
        with_options("--json", file, "--num-classes", 2, "--dataset", "x")
    with pytest.raises(RecordError, match="dataset = None: goes with --dataset-info"):
        with_options("--dataset-info", file, "--num-classes", 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num-classes", "2"), "--json --dataset-info is required"),
        (("--json", "x"), "--classes --num-classes is required"),
        (("--json", "x", "--dataset-info", "y"), "not allowed with argument --json"),
    ],
)
def test_options_that_are_required(options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        with_options(*options)
    assert message in capsys.readouterr().err


def dataset_info(folder: Path, entry: Any) -> Path:
    file = folder / "dataset_info.json"
    file.write_text(json.dumps({"other": {"hf_hub_url": "x/y"}, "mine": entry}))
    return file


def test_dataset_info_with_defaults(folder: Path) -> None:
    """The words are those that LLaMA-Factory's data/README.md gives as defaults."""
    (folder / "sub").mkdir()
    info = dataset_info(folder, {"file_name": "sub/data.json", "formatting": "sharegpt"})
    said = [{"from": "human", "value": ASK}, {"from": "gpt", "value": "Run."}]
    write(folder / "sub", [{"conversations": said, "videos": ["v/a.mp4"], "action_label": 1}])
    _, records = with_options("--dataset-info", info, "--dataset", "mine", "--classes", folder / "classes.txt")
    assert records == read_sharegpt(write(folder, [row()]), LABELS)  # videos are below dataset_info.json's folder


def test_dataset_info_with_names_of_its_own(folder: Path) -> None:
    tags = {"role_tag": "r", "content_tag": "c", "user_tag": "U", "assistant_tag": "A", "system_tag": "S"}
    columns = {"messages": "m", "videos": "files", "action_label": "class"}
    entry = {"file_name": "data.json", "formatting": "sharegpt", "columns": columns, "tags": tags}
    info = dataset_info(folder, entry)
    said = [{"r": "S", "c": "Look."}, {"r": "U", "c": ASK}, {"r": "A", "c": "Run."}]
    expected = read_sharegpt(write(folder, [row()]), LABELS)
    write(folder, [{"m": said, "files": ["v/a.mp4"], "class": 1}])
    assert with_options("--dataset-info", info, "--dataset", "mine", "--num-classes", 3)[1][0].prompt == ASK
    file, layout = read_dataset_info(info, "mine")
    assert read_sharegpt(file, LABELS, folder, layout) == expected
    with pytest.raises(RecordError, match="row 1: messages must be a list"):
        read_sharegpt(file, LABELS)  # nothing is guessed


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"hf_hub_url": "x/y", "formatting": "sharegpt"}, "mine: has no file_name; only data sets in local files"),
        ("x", "mine: has no file_name"),
        ({"file_name": "data.json"}, "mine: formatting = None: must be 'sharegpt'"),
        ({"file_name": "data.json", "formatting": "alpaca"}, "formatting = 'alpaca'"),
        ({"file_name": "d", "formatting": "sharegpt", "tags": {"role_tag": 1}}, "tags must be an object of names"),
        ({"file_name": "d", "formatting": "sharegpt", "columns": []}, "columns must be an object of names"),
    ],
)
def test_wrong_dataset_info(folder: Path, entry: Any, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        read_dataset_info(dataset_info(folder, entry), "mine")


def test_unknown_data_set_lists_those_there_are(folder: Path) -> None:
    with pytest.raises(RecordError, match="has no data set 'yours'; it has: other, mine"):
        read_dataset_info(dataset_info(folder, {}), "yours")
