import argparse
import csv
import io
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vidcls.sharding.readers.table import add_arguments, read, read_table
from vidcls.sharding.records import RecordError

KINETICS = (
    "label,youtube_id,time_start,time_end,split,is_cc\n"
    "abseiling,-3B32lodo2M,59,69,val,0\n"
    '"petting animal (not cat)",_dbcJuKJQNs,140,150,val,0\n'
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "classes.txt").write_bytes(b"walk\r\nrun\r\nfly a kite\r\n")
    return tmp_path


def read_text(folder: Path, text: str, **options):
    (folder / "list.csv").write_bytes(text.encode())
    return read_table(folder / "list.csv", **options)


def with_options(folder: Path, text: str, *options: str):
    (folder / "list.csv").write_text(text)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return read(parser.parse_args(["--list", str(folder / "list.csv"), *options]))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("header", ["", "path,label\n", "\ufeffPath,LABEL\n"])
@pytest.mark.parametrize("separator", [",", ";", "\t", " ", " , "])
def test_names_are_the_classes(folder: Path, separator: str, header: str, end: str) -> None:
    text = f"{header}a/1.mp4,walk\na/2.mp4,run\nb/1.mp4,walk\n"
    labels, records = read_text(folder, text.replace(",", separator).replace("\n", end))
    assert labels.names == ("run", "walk")
    assert [(record.key, record.label, record.class_name, record.source) for record in records] == [
        ("a_1", 1, "walk", "a/1.mp4"),
        ("a_2", 0, "run", "a/2.mp4"),
        ("b_1", 1, "walk", "b/1.mp4"),
    ]
    assert records[0].path == folder / "a/1.mp4"
    assert {(record.start, record.end, record.prompt) for record in records} == {(None, None, None)}


def test_videos_folder_and_absolute_paths(folder: Path) -> None:
    _, records = read_text(folder, "./a//1.mp4,x\n/data/2.mp4,x\n", videos=Path("elsewhere"))
    assert [record.path for record in records] == [Path("elsewhere/a/1.mp4"), Path("/data/2.mp4")]
    assert [record.key for record in records] == ["a_1", "_data_2"]


# The csv module writes what is to be read; labels with a letter, since numbers are indices.
FIELDS = st.text(st.characters(codec="utf-8", exclude_characters="\x00\r\n"), min_size=1, max_size=12)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rows=st.lists(st.tuples(FIELDS, FIELDS), min_size=1, max_size=8, unique_by=lambda row: row[0]),
    separator=st.sampled_from(",;\t"),
    named=st.booleans(),
)
def test_any_text_in_quotes(folder: Path, rows: list[tuple[str, str]], separator: str, named: bool) -> None:
    rows = [(f"v{path.replace('/', '_')}.mp4", f"c{label}c") for path, label in rows]
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=separator, quoting=csv.QUOTE_ALL)
    writer.writerows([("path", "label")] * named + rows)
    _, records = read_text(folder, stream.getvalue())
    assert [(record.source, record.class_name) for record in records] == rows


@pytest.mark.parametrize("labels", ["1,2", "run,fly a kite"])
def test_labels_are_names_or_indices_of_the_class_file(folder: Path, labels: str) -> None:
    first, second = labels.split(",")
    space, records = read_text(folder, f"a.mp4,{first}\nb.mp4,{second}\n", classes_file=folder / "classes.txt")
    assert space.names == ("walk", "run", "fly a kite")
    assert [(record.label, record.class_name) for record in records] == [(1, "run"), (2, "fly a kite")]


def test_names_that_are_numbers_are_names(folder: Path) -> None:
    (folder / "classes.txt").write_text("2\n1\n0\n")
    _, records = read_text(folder, "a.mp4,2\nb.mp4,0\n", classes_file=folder / "classes.txt")
    assert [(record.label, record.class_name) for record in records] == [(0, "2"), (2, "0")]


@pytest.mark.parametrize("labels", ["0,1", "0,-1", "0.0,1.0"])
def test_numbers_need_a_class_file(folder: Path, labels: str) -> None:
    first, second = labels.split(",")
    with pytest.raises(RecordError, match=r"list\.csv: labels are numbers: .*--classes FILE"):
        read_text(folder, f"a.mp4 {first}\nb.mp4 {second}\n")


@pytest.mark.parametrize("wrong", ["3", "-1", "1.0"])
def test_index_out_of_range(folder: Path, wrong: str) -> None:
    with pytest.raises(RecordError, match=rf"csv:2: label '{wrong}' is not an index from 0 to 2"):
        read_text(folder, f"a.mp4 0\nb.mp4 {wrong}\n", classes_file=folder / "classes.txt")


@pytest.mark.parametrize("wrong", ["swim", "1", "Run"])
def test_name_that_is_not_in_the_class_file(folder: Path, wrong: str) -> None:
    with pytest.raises(RecordError, match=rf"csv:2: label '{wrong}' is not one of its names \(3 in .*classes\.txt"):
        read_text(folder, f"a.mp4,run\nb.mp4,{wrong}\n", classes_file=folder / "classes.txt")


def test_segments_of_one_video(folder: Path) -> None:
    text = "a.mp4,x,0,12\na.mp4,y,12,24.5\na.mp4,x,0:24.5,\na.mp4,x,,\na.mp4,x,00:01:02,1:03.25\n"
    _, records = read_text(folder, text)
    assert [(record.start, record.end) for record in records] == [
        (0.0, 12.0),
        (12.0, 24.5),
        (24.5, None),
        (None, None),
        (62.0, 63.25),
    ]
    assert {record.path for record in records} == {folder / "a.mp4"}
    assert len({record.key for record in records}) == 5
    assert (records[0].key, records[3].key) == ("a_0-12", "a")
    again = read_text(folder, "path;start;end;label\na.mp4;12;24.5;y\n")[1][0]
    assert (again.key, again.start, again.end) == (records[1].key, 12.0, 24.5)


def test_video_named_like_a_segment_has_its_own_key(folder: Path) -> None:
    _, records = read_text(folder, "a.mp4,x,0,12\na/0-12.mp4,x,,\na_0-12.mp4,x,,\n")
    assert len({record.key for record in records}) == 3


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(1, 359_999))
def test_clock_times(folder: Path, seconds: int) -> None:
    """Against datetime's way of writing a time within an hour."""
    hours, rest = divmod(seconds, 3600)
    clock = f"{hours}:{str(timedelta(seconds=rest))[2:]}"
    _, records = read_text(folder, f"a.mp4,x,{clock},\nb.mp4,x,{seconds}.25,\n")
    assert [record.start for record in records] == [seconds, seconds + 0.25]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("b.mp4,x,5,5", r"start = 5\.0, end = 5\.0: need 0 <= start < end"),
        ("b.mp4,x,5,4", "need 0 <= start < end"),
        ("b.mp4,x,-1,4", "start = '-1': must be seconds or"),
        ("b.mp4,x,1,nan", "end = 'nan': must be seconds or"),
        ("b.mp4,x,0:75,2:00", "start = '0:75': must be seconds or"),
        ("a.mp4,y,0:01,2", r"the same clip as .*list\.csv:1: a\.mp4 1-2"),
        ("./a.mp4,x,1,2", r"the same clip as .*list\.csv:1"),
        ("b.mp4,x", r"2 columns separated by ',', need 4 \(path, label, start, end\)"),
        ("b.mp4,,1,2", "the label is empty"),
        (",x,1,2", "path = '': is not a file's name"),
        ("b/,x,1,2", "path = 'b/': is not a file's name"),
        ('"b.mp4"c,x,1,2', "expected after"),
    ],
)
def test_wrong_row_names_file_and_line(folder: Path, line: str, message: str) -> None:
    with pytest.raises(RecordError, match=rf"list\.csv:3: {message}|list\.csv:3: .*{message}"):
        read_text(folder, f"a.mp4,x,1,2\n\n{line}\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no clips"),
        ("\n\n", "lists no clips"),
        ("path,label\n", "lists no clips"),
        ("a.mp4\nb.mp4\n", "has one column only"),
        ("a.mp4 300 5\n", r"csv:1: 3 columns separated by ' ' and no header"),
        ("path,path,label\na,b,c\n", r"csv:1: column 'path' is there twice"),
        ("path,class\na,b\n", r"csv:1: need the columns label and path .*have path, class"),
        ("video,label\na,b\n", r"csv:1: need the columns label and path .*have video, label"),
        ("youtube_id,time_start,time_end,split\nx,1,2,test\n", r"csv:1: need the columns label"),
    ],
)
def test_table_that_cannot_be_used(folder: Path, text: str, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        read_text(folder, text)


def test_separator_of_the_options_wins(folder: Path) -> None:
    text = "a;b.mp4,x\n"
    assert with_options(folder, text)[1][0].source == "a"
    assert with_options(folder, text, "--separator", "comma")[1][0].source == "a;b.mp4"
    assert with_options(folder, '"a;b.mp4",x\n')[1][0].source == "a;b.mp4"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_kinetics(folder: Path, end: str) -> None:
    labels, records = read_text(folder, KINETICS.replace("\n", end), videos=Path("k400"))
    assert labels.names == ("abseiling", "petting animal (not cat)")
    assert [record.path for record in records] == [
        Path("k400/abseiling/-3B32lodo2M_000059_000069.mp4"),
        Path("k400/petting animal (not cat)/_dbcJuKJQNs_000140_000150.mp4"),
    ]
    assert {(record.start, record.end) for record in records} == {(None, None)}
    assert records[0].key == "abseiling_-3B32lodo2M_000059_000069"


def test_kinetics_not_cut_yet(folder: Path) -> None:
    options = ("--cut", "--path-template", "{split}/{youtube_id}.mkv", "--videos", "k400")
    _, records = with_options(folder, KINETICS, *options)
    assert [(record.path, record.start, record.end) for record in records] == [
        (Path("k400/val/-3B32lodo2M.mkv"), 59.0, 69.0),
        (Path("k400/val/_dbcJuKJQNs.mkv"), 140.0, 150.0),
    ]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (KINETICS, ("--path-template", "{name}.mp4"), r"csv:2: path template '\{name\}\.mp4' does not fit: KeyError"),
        (KINETICS, ("--path-template", "{}.mp4"), r"csv:2: path template .* does not fit"),
        (KINETICS.replace(",59,", ",59.5,"), (), r"csv:2: path template .*the times are whole numbers if"),
        (KINETICS.replace(",59,", ",x,"), (), r"csv:2: time_start = 'x': must be seconds"),
        (KINETICS.replace(",59,", ",70,"), ("--cut",), r"csv:2: start = 70\.0, end = 69\.0"),
        ("path,label\na,b\n", ("--cut",), r"csv:1: --cut needs the columns time_start and time_end"),
        ("a,b\n", ("--cut",), r"csv:1: .*--cut needs a header"),
        ("path,label,start,time_start,time_end\na,b,1,1,2\n", ("--cut",), r"csv:1: --cut takes time_start"),
    ],
)
def test_kinetics_errors(folder: Path, text: str, options: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        with_options(folder, text, *options)
