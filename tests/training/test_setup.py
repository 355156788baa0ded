"""What is refused before anything is built: here, shards of a URL that do not fit the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import ROOT
from tests.support.web import web
from vidcls.config import ConfigError, config_from_values
from vidcls.training.setup import setup


@pytest.mark.parametrize(
    ("options", "shards_in_cache", "message"),
    [
        ({}, 2.5, r"shuffle_shards: None, of 3 shards with .* cache_gb \(.*\) together: at most 1 do"),
        ({"shuffle_shards": 2}, 2.5, "shuffle_shards: 2, of 3 shards .* at most 1 do"),
        ({"shuffle_shards": 1}, 1.5, "shuffle_shards: 1, .* not even two shards do, which take "),
    ],
)
def test_windows_that_do_not_fit_the_cache(
    small_shards: Path, tmp_path: Path, options: dict[str, Any], shards_in_cache: float, message: str
) -> None:
    largest = max(path.stat().st_size for path in small_shards.glob("*.tar"))
    with web() as served:
        served.files = {path.name: path.read_bytes() for path in small_shards.iterdir()}
        config = config_from_values(
            {
                "model_name_or_path": "tiny",
                "dataset": served.url,
                "output_dir": str(tmp_path / "out"),
                "per_device_train_batch_size": 2,
                "deepspeed": str(ROOT / "ds_configs" / "zero2.json"),
                "cache_dir": str(tmp_path / "cache"),
                "cache_gb": shards_in_cache * largest / 10**9,
                **options,
            }
        )
        with pytest.raises(ConfigError, match=message):
            setup(config)
        assert not [name for name in served.requests if name.endswith(".tar")]
