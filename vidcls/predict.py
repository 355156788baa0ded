"""Classify video files with a checkpoint, through the same decoding, storing and resizing as in training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from vidcls import distributed
from vidcls.data.batch import collate, prepare_clip
from vidcls.data.codecs import decode_frames, encode_frames
from vidcls.data.loader import FrameChoice
from vidcls.evaluation.evaluate import class_scores
from vidcls.evaluation.heads import StoredHead, choose_head, frame_choice, read_heads
from vidcls.model.classifier import ActionClassifier
from vidcls.model.pretrained import load_model
from vidcls.model.prompt import PromptEncoder
from vidcls.sharding.decode import decode_clip


class Predictor:
    """A loaded checkpoint, and one of its heads.

    Predictor.load("runs/my/checkpoint-500").predict("clip.mp4")[0]   ->  ("Archery", 0.97)
    """

    def __init__(
        self, model: ActionClassifier, encoder: PromptEncoder, head: StoredHead, frame_choice: FrameChoice
    ) -> None:
        self.model, self.encoder, self.head, self.frame_choice = model, encoder, head, frame_choice

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        head: str | None = None,
        base: str | None = None,
        trust_remote_code: bool = False,
    ) -> Predictor:
        """Read a checkpoint-N folder onto the accelerator of this machine.

        Args:
            head: whose classes are predicted; needed where there are several.
            base: the base model's folder, if it has moved since training.
            trust_remote_code: let that folder's own tokenizer code run.

        Raises:
            ValueError: a file is missing or damaged, or no one head is meant; names it, or the heads.
        """
        folder = Path(checkpoint)
        chosen = choose_head(read_heads(folder), head)
        model, encoder, spec = load_model(folder, model_name_or_path=base, trust_remote_code=trust_remote_code)
        return cls(model.to(distributed.device()), encoder, chosen, frame_choice(spec))

    def predict(self, video: str | Path) -> list[tuple[str, float]]:
        """(class name, probability) of every class of the head, the most probable first.

        Raises:
            DecodeError: the file cannot be decoded; gives the reason.
        """
        settings, labels = self.head.settings, self.head.labels
        clip = decode_clip(video, settings)
        chosen = self.frame_choice.evaluation(len(clip.frames), 0, 1)
        # Through the codec as in the shards: the model never saw frames without its traces.
        height, width = clip.frames.shape[1:3]
        frames = decode_frames(encode_frames(clip.frames[chosen], settings), settings.codec, height, width)
        prepared = prepare_clip(
            key=str(video),
            label=0,
            frames=frames,
            times=clip.times[chosen].tolist(),
            prompt=self.head.prompt,
            encoder=self.encoder,
            max_frames=len(chosen),
        )
        batch = collate([replace(prepared, head=self.head.number)])
        device = next(self.model.heads.parameters()).device
        with torch.inference_mode():
            logits_BC = self.model(**batch.to(device).model_inputs())
        scores_C = class_scores(logits_BC, len(labels))[0]
        order = torch.argsort(scores_C, descending=True, stable=True).tolist()
        return [(labels.names[i], float(scores_C[i])) for i in order]
