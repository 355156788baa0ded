import hashlib
from pathlib import Path

import pytest

from vidcls.data.records import ClipRecord, RecordError, make_keys, read_folder, read_ucf101

CLASSES = "1 Archery\r\n2 Surfing\r\n3 HorseRace\r\n"


@pytest.fixture
def ucf101(tmp_path: Path) -> Path:
    """Two clips on disk, a class file and a list with CRLF line ends."""
    for name in ("Archery/v_Archery_g01_c01.avi", "HorseRace/v_HorseRace_g02_c03.avi"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    (tmp_path / "classInd.txt").write_bytes(CLASSES.encode())
    return tmp_path


def read(folder: Path, lines: str):
    (folder / "list.txt").write_bytes(lines.encode())
    return read_ucf101(folder, folder / "list.txt", folder / "classInd.txt")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r\n\r\n"])
@pytest.mark.parametrize("columns", [("", ""), (" 1", " 3")])
def test_ucf101_list(ucf101: Path, columns: tuple[str, str], end: str) -> None:
    labels, records = read(
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
        read(ucf101, lines)


def test_missing_files_are_one_error(ucf101: Path) -> None:
    with pytest.raises(RecordError, match=r"7 of 7 video files are missing: .*c0.avi, .*c4.avi and 2 more"):
        read(ucf101, "".join(f"Surfing/c{i}.avi\n" for i in range(7)))


@pytest.mark.parametrize("classes", ["0 Archery\n", "1 Archery\n3 Surfing\n", "Archery\n", "1 A\n2 A\n", ""])
def test_wrong_class_file(ucf101: Path, classes: str) -> None:
    (ucf101 / "classInd.txt").write_text(classes)
    with pytest.raises(RecordError, match="classInd"):
        read(ucf101, "Archery/v_Archery_g01_c01.avi\n")


@pytest.mark.real
@pytest.mark.parametrize("split", ["01", "02", "03"])
def test_official_lists(real_data: Path, tmp_path: Path, split: str) -> None:
    lists = real_data / "ucf101" / "annotations"
    test_names = (lists / f"testlist{split}.txt").read_text().split()
    for name in test_names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    labels, records = read_ucf101(tmp_path, lists / f"testlist{split}.txt", lists / "classInd.txt")
    assert len(labels) == 101
    assert (labels.names[0], labels.names[100]) == ("ApplyEyeMakeup", "YoYo")
    assert len(records) == {"01": 3783, "02": 3734, "03": 3696}[split]
    assert {record.label for record in records} == set(range(101))
    with pytest.raises(RecordError, match=r"of 9[0-9]{3} video files are missing"):
        read_ucf101(tmp_path / "none", lists / f"trainlist{split}.txt", lists / "classInd.txt")


def test_keys_are_safe_short_and_stable() -> None:
    names = ["a/b_c.mp4", "a_b/c.mp4", "d/e.mp4", "d/e.avi", "d/f.g.mp4", "d/ü.mp4", f"d/{'x' * 200}.mp4", "d/h-1.mp4"]
    keys = make_keys(names)
    assert len(set(keys)) == len(names)
    assert keys[-1] == "d_h-1"
    assert keys[4] == "d_f_g-" + hashlib.sha256(b"d/f.g.mp4").hexdigest()[:8]
    assert max(map(len, keys)) == 80
    for key in keys:
        ClipRecord(key, Path("x"), 0, "c")


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "a b", "x" * 81, "ü", "a\n"])
def test_record_refuses_keys_that_tars_cannot_carry(key: str) -> None:
    with pytest.raises(RecordError, match="key = "):
        ClipRecord(key, Path("x"), 0, "c")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ["run/1.mp4", "run/deep/er/2.MP4", "run/3.avi", "run/4.webm", "walk/1.mp4", "one/1.mp4"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ["README.txt", "run/notes.txt", "run/.5.mp4"]:
        (tmp_path / name).touch()
    (tmp_path / "walk/2.mp4").symlink_to(tmp_path / "walk/1.mp4")
    return tmp_path


def test_folder(folder: Path) -> None:
    labels, records = read_folder(folder)
    assert labels.names == ("one", "run", "walk")
    sources = ["one/1.mp4", "run/1.mp4", "run/3.avi", "run/4.webm", "run/deep/er/2.MP4", "walk/1.mp4", "walk/2.mp4"]
    assert [record.source for record in records] == sources
    assert [record.label for record in records] == [0, 1, 1, 1, 1, 2, 2]
    assert records[4].key == "run_deep_er_2"


def test_folder_split_is_stratified_and_fixed(folder: Path) -> None:
    _, train = read_folder(folder, "train")
    _, test = read_folder(folder, "test")
    _, both = read_folder(folder)
    assert sorted(train + test, key=lambda record: record.source) == both  # keys included
    by_hash = sorted(
        (record.source for record in both if record.class_name == "run"),
        key=lambda source: hashlib.sha256(source.encode()).hexdigest(),
    )
    assert [record.source for record in test if record.class_name == "run"] == by_hash[:1]
    assert [record.class_name for record in test] == ["run", "walk"]  # a class with one clip only trains
    _, most = read_folder(folder, "test", 0.99)
    assert [record.class_name for record in most].count("run") == 3  # one is left to train on


def test_folder_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="split = 'valid'"):
        read_folder(folder, "valid")
    with pytest.raises(RecordError, match=r"test_fraction = 1\.0"):
        read_folder(folder, "test", 1.0)
    with pytest.raises(RecordError, match="is not a folder"):
        read_folder(folder / "none")
    (folder / "empty").mkdir()
    with pytest.raises(RecordError, match="no video files for empty"):
        read_folder(folder)
    with pytest.raises(RecordError, match="no class folders"):
        read_folder(folder / "empty")
    (folder / "empty/only.mp4").touch()
    (tmp_path / "new/c").mkdir(parents=True)
    (tmp_path / "new/c/1.mp4").touch()
    with pytest.raises(RecordError, match="test split is empty"):
        read_folder(tmp_path / "new", "test")
