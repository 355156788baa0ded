from pathlib import Path

from tests.support.clips import class_folder, text_as_video, video
from vidcls.data.index import ShardIndex
from vidcls.data.labels import LabelSpace
from vidcls.data.settings import DecodeSettings
from vidcls.inspection.overview import Overview
from vidcls.sharding.records import ClipRecord
from vidcls.sharding.writer import Plan, write_shards


def test_counts_of_a_small_data_set(tmp_path: Path) -> None:
    """3 clips of a, 1 of c, none of b, one that fails; lengths and prompts differ."""
    videos = class_folder(tmp_path / "videos", ("a",), per_class=2)
    labels = LabelSpace(("a", "b", "c"))
    records = [
        ClipRecord("one", videos / "a" / "clip0.mp4", 0, "a", prompt="<video>What? <ACTION>"),
        ClipRecord("two", videos / "a" / "clip1.mp4", 0, "a", prompt="<video>How? <ACTION>"),
        ClipRecord("long", video(videos / "long.mp4", frames=72), 0, "a"),
        ClipRecord("c", videos / "a" / "clip0.mp4", 2, "c", prompt="<video>What? <ACTION>"),
        ClipRecord("none", text_as_video(videos / "text.mp4"), 2, "c"),
    ]
    settings = DecodeSettings(frames=None, fps=2.0, max_frames=32, short_side=32)
    write_shards(Plan(records, labels, settings, 2), tmp_path / "out", workers=0)
    overview = Overview.of(ShardIndex.open(tmp_path / "out"))
    assert (overview.clips, overview.failed, overview.damaged, overview.shards) == (4, 1, 0, 2)
    assert overview.per_class == (3, 0, 1)
    assert overview.by_frequency == [("a", 3), ("c", 1)]
    assert (overview.empty_classes, overview.imbalance) == (["b"], 3.0)
    assert overview.frame_counts == ((4, 3), (12, 1))  # 2 and 6 seconds
    assert overview.frame_sizes == (((32, 32), 4),)
    assert (overview.prompts, overview.without_prompt) == (2, 1)
    assert overview.first_prompts == ("<video>What? <ACTION>", "<video>How? <ACTION>")
    assert overview.bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))
    assert sum(overview.decoders.values()) == 4
