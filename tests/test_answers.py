"""A run with lm_loss_weight learns to say the action too; without it nothing of that is there."""

from __future__ import annotations

import copy
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2_5_VLForConditionalGeneration

from tests.support import learning
from tests.support.shards import make_shards
from tools.make_motion_clips import CLASSES, make_motion_clips
from vidcls.config import load_config
from vidcls.data.batch import seconds_per_grid
from vidcls.data.index import ShardIndex
from vidcls.data.loader import ClipBatches, ClipSource, Request
from vidcls.data.shards import ShardReader
from vidcls.evaluation.heads import frame_choice, read_heads
from vidcls.model.heads import ActionDecoder
from vidcls.model.patches import frames_to_patches
from vidcls.model.pretrained import TrainingExtras, build_model, load_model
from vidcls.training.data_sets import open_data_sets
from vidcls.training.heads import build_heads

pytestmark = [pytest.mark.launch, pytest.mark.long, pytest.mark.timeout(900)]

WEIGHT = 0.1
STEPS = 300
RECIPE = {"max_steps": STEPS, "save_steps": STEPS, "logging_steps": 1, "seed": 1}
END = "<|im_end|>"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("answers")
    videos = make_motion_clips(folder / "videos", per_class=100)
    return {s: make_shards(videos, folder / s, split=s, short_side=84) for s in ("train", "test")}


@pytest.fixture(scope="module")
def runs(shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The last checkpoints of "with" and "without", which differ in lm_loss_weight alone."""
    recipe = {**RECIPE, "dataset": str(shards["train"])}
    recipes = {"with": {**recipe, "lm_loss_weight": WEIGHT}, "without": recipe}
    return learning.train(tmp_path_factory.mktemp("answer_runs"), recipes)


class Speaker:
    """Transformers' own model with its vocabulary head, and the clips of `shards` with all text before an answer.

    It shares with vidcls the weights and what is read from the shards; positions, the clips' places in the text, logits
    and losses are transformers'.
    """

    def __init__(self, checkpoint: Path, shards: Path, *, trained: bool = True) -> None:
        model, encoder, spec = load_model(checkpoint)
        if not trained:
            heads = {name: head for name, head in model.heads.items() if isinstance(head, ActionDecoder)}
            model = build_model(spec, encoder, heads, seed=0).eval()
        self.tokenizer, self.geometry = encoder.tokenizer, model.geometry
        backbone = model.backbone.merge_and_unload()
        self.whole = Qwen2_5_VLForConditionalGeneration(backbone.config).eval()
        self.whole.model = backbone
        embed = backbone.language_model.embed_tokens
        self.whole.lm_head.weight = copy.deepcopy(embed.weight)  # the answer's loss knows the table's own row
        with torch.no_grad():
            embed.weight[model.action_token_id] = model.action_token.weight
        self.whole.float()
        index, reader = ShardIndex.open(shards), ShardReader(ShardIndex.open(shards))
        (head,) = read_heads(checkpoint)
        clips = ClipBatches([ClipSource(index, head.prompt)], encoder, frame_choice(spec))
        self.batch = clips.read(Request(tuple(range(len(index)))))
        self.names = [index.labels.names[label] for label in self.batch.labels_B.tolist()]
        times = [reader.read(sample).about.frame_times for sample in range(len(index))]
        self.seconds_B = torch.tensor([seconds_per_grid(each, encoder) for each in times])
        asked = []
        for grid, seconds in zip(self.batch.grid_thw, self.seconds_B.tolist(), strict=True):
            row = encoder.encode(head.prompt, grid, seconds, answer="")
            asked.append(row.input_ids[: row.answer_start])
        self.asked_BL = torch.from_numpy(np.stack(asked))

    def perplexity(self) -> float:
        """Of each clip's class name and its end, given what is before; the mean over clips is in log space."""
        answers = [torch.tensor(self.tokenizer.encode(name + END, add_special_tokens=False)) for name in self.names]
        answers_BT = pad_sequence(answers, batch_first=True, padding_value=-100)
        logits_BTV = self._logits(torch.cat([self.asked_BL, answers_BT.clamp(min=0)], dim=1))
        behind_BTV = logits_BTV[:, self.asked_BL.shape[1] - 1 : -1]
        losses_BT = F.cross_entropy(behind_BTV.transpose(1, 2), answers_BT, reduction="none")
        return math.exp((losses_BT.sum(1) / (answers_BT != -100).sum(1)).mean())

    def says(self, most: int = 6) -> list[str]:
        """What greedy decoding makes of each clip, up to its end."""
        ids_BL = self.asked_BL
        for _ in range(most):
            ids_BL = torch.cat([ids_BL, self._logits(ids_BL)[:, -1].argmax(-1, keepdim=True)], dim=1)
        texts = self.tokenizer.batch_decode(ids_BL[:, self.asked_BL.shape[1] :])
        return [text.split(END)[0] for text in texts]

    @torch.no_grad()
    def _logits(self, ids_BL: torch.Tensor) -> torch.Tensor:
        grids, config = self.batch.grid_thw, self.whole.config
        return self.whole(
            input_ids=ids_BL,
            pixel_values_videos=frames_to_patches(self.batch.frames, grids, self.geometry, torch.float32),
            video_grid_thw=torch.tensor(grids),
            second_per_grid_ts=self.seconds_B,
            mm_token_type_ids=(ids_BL == config.video_token_id).int() * 2,
            use_cache=False,
        ).logits


@pytest.fixture(scope="module")
def speaker(runs: dict[str, Path], shards: dict[str, Path]) -> Speaker:
    return Speaker(runs["with"], shards["test"])


def test_answers_become_likely_on_clips_seen_and_not_seen(
    speaker: Speaker, runs: dict[str, Path], shards: dict[str, Path]
) -> None:
    rows = learning.log_rows(runs["with"].parent)
    first, last = (math.exp(rows[place]["answer_loss"]) for place in (0, -1))
    before = Speaker(runs["with"], shards["test"], trained=False).perplexity()
    after, without = speaker.perplexity(), Speaker(runs["without"], shards["test"]).perplexity()
    print(f"answer perplexity: training {first:.1f} -> {last:.3f}; held out {before:.1f} -> {after:.3f}", end="; ")
    print(f"without the loss {without:.1f}")
    assert last < 0.1 * first
    assert after < 0.1 * before
    assert after < 0.1 * without


def test_the_model_says_the_action(speaker: Speaker) -> None:
    said = speaker.says()
    share = float(np.mean([a == b for a, b in zip(said, speaker.names, strict=True)]))
    print(f"says the action of {share:.2f} of {len(said)} held-out clips; says {dict(Counter(said))}")
    assert {*said} <= {*CLASSES}
    assert share >= 0.8


def test_classification_is_as_good_as_without(runs: dict[str, Path], shards: dict[str, Path]) -> None:
    scores = {name: learning.top1(learning.predictions(path, shards["test"])) for name, path in runs.items()}
    print(f"top-1 {scores['with']:.2f} with answers, {scores['without']:.2f} without")
    assert min(scores.values()) >= 0.9
    # Each of 100 clips; a difference of two such shares has a deviation of 0.042 at 0.9.
    assert abs(scores["with"] - scores["without"]) <= 0.1


def test_the_loss_is_that_of_the_class_and_so_much_of_the_answers(runs: dict[str, Path]) -> None:
    """Before the first update both runs have one model; further on, only rows of one run can be compared."""
    first, without = (learning.log_rows(runs[name].parent)[0] for name in ("with", "without"))
    assert first["loss"] == pytest.approx(without["loss"] + WEIGHT * first["answer_loss"], rel=2e-3)


def test_without_a_weight_nothing_of_it_is_there(runs: dict[str, Path]) -> None:
    """No answer in the text, no vocabulary matrix in the model, no number in the log; with one, all three."""
    for name, wanted in (("with", True), ("without", False)):
        config = load_config(runs[name].parent.parent / f"{name}.yaml")
        _, encoder, spec = load_model(runs[name])
        data = open_data_sets(config)
        answers = config.optim.lm_loss_weight > 0
        clips = ClipBatches(data.sources(), encoder, frame_choice(spec), seed=1, answers=answers)
        batch = clips.read(Request((0, 1), (0, 0), epochs=(0, 0)))
        behind = batch.input_ids_BL[0, int(batch.action_positions_B[0]) + 1 :]
        model = build_model(
            spec, encoder, build_heads(config, data, spec, encoder), seed=1, extras=TrainingExtras(answers=answers)
        )
        found = [
            batch.answer_labels_BL is not None,
            "answer_labels_BL" in batch.model_inputs(),
            len(behind) > 0,
            model.language_head is not None,
            *("answer_loss" in row for row in learning.log_rows(runs[name].parent)),
        ]
        assert {*found} == {wanted}, name
        assert not any("language_head" in key for key in load_file(runs[name] / "adapter_model.safetensors"))
