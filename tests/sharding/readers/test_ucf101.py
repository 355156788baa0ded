import argparse
from pathlib import Path

import pytest

from vidcls.sharding.readers.ucf101 import add_arguments, read, read_ucf101
from vidcls.sharding.records import RecordError

CLASSES = "1 Archery\r\n2 Surfing\r\n3 HorseRace\r\n"
# Of the data set's own page: clips in the lists of each split.
OFFICIAL = {"01": (9537, 3783), "02": (9586, 3734), "03": (9624, 3696)}


@pytest.fixture
def ucf101(tmp_path: Path) -> Path:
    (tmp_path / "classInd.txt").write_bytes(CLASSES.encode())
    return tmp_path


def read_lines(folder: Path, lines: str):
    (folder / "list.txt").write_bytes(lines.encode())
    return read_ucf101(folder, folder / "list.txt", folder / "classInd.txt")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r\n\r\n"])
@pytest.mark.parametrize("columns", [("", ""), (" 1", " 3")])
def test_list(ucf101: Path, columns: tuple[str, str], end: str) -> None:
    labels, records = read_lines(
        ucf101,
        f"HorseRace/v_HorseRace_g02_c03.avi{columns[1]}{end}Archery/v_Archery_g01_c01.avi{columns[0]}{end}",
    )
    assert labels.names == ("Archery", "Surfing", "HorseRace")
    assert [(record.key, record.label, record.class_name) for record in records] == [
        ("v_HorseRace_g02_c03", 2, "HorseRace"),
        ("v_Archery_g01_c01", 0, "Archery"),
    ]
    assert records[0].path == ucf101 / "HorseRace/v_HorseRace_g02_c03.avi"
    assert records[0].source == "HorseRace/v_HorseRace_g02_c03.avi"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("\nArchery/v_Archery_g01_c01.avi 2\n", r"list.txt:2: label 2 does not agree with folder Archery"),
        ("Archery/v_Archery_g01_c01.avi x\n", r"list.txt:1: label x does not agree"),
        ("Skiing/v_a.avi\n", r"list.txt:1: class 'Skiing' is unknown"),
        ("v_Archery_g01_c01.avi\n", r"list.txt:1: .*must be"),
        ("Archery/..\n", r"list.txt:1: .*must be"),
        ("Archery/a/b.avi\n", r"list.txt:1: .*must be"),
        ("Archery/v_Archery_g01_c01.avi\n" * 2, "twice"),
        ("\n", "lists no clips"),
    ],
)
def test_wrong_list_names_file_and_line(ucf101: Path, lines: str, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        read_lines(ucf101, lines)


@pytest.mark.parametrize("classes", ["0 Archery\n", "1 Archery\n3 Surfing\n", "Archery\n", "1 A\n2 A\n", ""])
def test_wrong_class_file(ucf101: Path, classes: str) -> None:
    (ucf101 / "classInd.txt").write_text(classes)
    with pytest.raises(RecordError, match="classInd"):
        read_lines(ucf101, "Archery/v_Archery_g01_c01.avi\n")


@pytest.mark.real
@pytest.mark.parametrize("split", OFFICIAL)
def test_official_lists(real_data: Path, split: str) -> None:
    lists = real_data / "ucf101" / "annotations"
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    seen: dict[str, set[str]] = {}
    for side, count in zip(("train", "test"), OFFICIAL[split], strict=True):
        options = ["--list", f"{lists}/{side}list{split}.txt", "--classes", f"{lists}/classInd.txt", "--videos", "v"]
        labels, records = read(parser.parse_args(options))
        assert len(labels) == 101
        assert (labels.names[0], labels.names[100]) == ("ApplyEyeMakeup", "YoYo")
        assert len(records) == count
        assert {record.label for record in records} == set(range(101))
        assert all(record.key.split("_")[1].lower() == record.class_name.lower() for record in records)
        seen[side] = {record.key for record in records}
    assert not seen["train"] & seen["test"]
    assert len(seen["train"] | seen["test"]) == 13320
