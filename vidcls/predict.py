"""Classify video files with a checkpoint, through the same decoding, storing and resizing as in training."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from vidcls import distributed
from vidcls.data.batch import collate, prepare_clip
from vidcls.data.codecs import decode_frames, encode_frames
from vidcls.data.labels import LabelSpace
from vidcls.data.settings import DecodeSettings
from vidcls.model.classifier import ActionClassifier
from vidcls.model.pretrained import LABELS_NAME, PREPROCESSING_NAME, ModelSpec, load_model
from vidcls.model.prompt import PromptEncoder
from vidcls.sharding.decode import decode_clip


class Predictor:
    """A loaded checkpoint.

    Predictor.load("runs/my/checkpoint-500").predict("clip.mp4")[0]   ->  ("Archery", 0.97)
    """

    def __init__(
        self,
        model: ActionClassifier,
        encoder: PromptEncoder,
        spec: ModelSpec,
        labels: LabelSpace,
        settings: DecodeSettings,
    ) -> None:
        self.model, self.encoder, self.spec, self.labels, self.settings = model, encoder, spec, labels, settings

    @classmethod
    def load(cls, checkpoint: str | Path, *, base: str | None = None) -> Predictor:
        """Read a checkpoint-N folder onto the accelerator of this machine.

        Args:
            base: the base model's folder, if it has moved since training.

        Raises:
            ValueError: a file is missing or damaged; names it.
        """
        folder = Path(checkpoint)
        model, encoder, spec = load_model(folder, model_name_or_path=base)
        labels = LabelSpace.load(folder / LABELS_NAME)
        settings = DecodeSettings.from_dict(json.loads((folder / PREPROCESSING_NAME).read_text(encoding="utf-8")))
        return cls(model.to(distributed.device()), encoder, spec, labels, settings)

    def predict(self, video: str | Path) -> list[tuple[str, float]]:
        """(class name, probability) of every class, the most probable first.

        Raises:
            DecodeError: the file cannot be decoded; gives the reason.
        """
        clip = decode_clip(video, self.settings)
        # Through the codec as in the shards: the model never saw frames without its traces.
        height, width = clip.frames.shape[1:3]
        frames = decode_frames(encode_frames(clip.frames, self.settings), self.settings.codec, height, width)
        prepared = prepare_clip(
            key=str(video),
            label=0,
            frames=frames,
            times=clip.times.tolist(),
            prompt=self.spec.prompt,
            encoder=self.encoder,
            max_frames=self.spec.video_maxlen,
        )
        device = next(self.model.head.parameters()).device
        with torch.inference_mode():
            logits_C = self.model(**collate([prepared]).to(device).model_inputs())[0]
        scores_C = torch.softmax(logits_C.double(), dim=-1)
        order = torch.argsort(scores_C, descending=True, stable=True).tolist()
        return [(self.labels.names[i], float(scores_C[i])) for i in order]
