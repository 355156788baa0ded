"""The code of a model card: from a video file to class scores with transformers and peft alone."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import dedent

from vidcls.data.settings import DecodeSettings
from vidcls.evaluation.heads import StoredHead, frame_choice
from vidcls.geometry import FACTOR
from vidcls.model.heads import CONFIG_NAME, WEIGHTS_NAME
from vidcls.model.patches import CLIP_MEAN, CLIP_STD
from vidcls.model.pretrained import HEADS_NAME, LABELS_NAME, ModelSpec
from vidcls.model.prompt import PromptEncoder

HEADS = {
    "linear": 'logits = F.linear(state, head["layers.weight"], head["layers.bias"])',
    "mlp": dedent("""\
        inner = F.gelu(F.linear(state, head["layers.0.weight"], head["layers.0.bias"]))
        logits = F.linear(inner, head["layers.2.weight"], head["layers.2.bias"])"""),
    "attention": dedent("""\
        def linear(x, name):
            return F.linear(x, head[f"layers.{{name}}.weight"], head.get(f"layers.{{name}}.bias"))
        def norm(x, name):
            return F.layer_norm(x, x.shape[-1:], head[f"layers.{{name}}.weight"], head[f"layers.{{name}}.bias"])
        def split(x):
            return x.unflatten(-1, ({num_heads}, -1)).transpose(1, 2)
        seen = norm(hidden[:, (ids[0] == {video_id}) | (ids[0] == {action_id})], "token_norm")
        query = linear(norm(state, "state_norm"), "to_query")
        found = F.scaled_dot_product_attention(
            split(query[:, None]), split(linear(seen, "to_key")), split(linear(seen, "to_value"))
        )
        logits = linear(norm(query + linear(found.flatten(1), "to_output"), "output_norm"), "classifier")"""),
}
# As the training clips were stored. Pillow's JPEG has other arithmetic, which moves logits by some hundredths.
STORE = {
    "jpg": [
        'stored = {{"quality": {quality}, "colorsubsampling": "420"}}',
        "jpegs = [simplejpeg.encode_jpeg(np.array(image), **stored) for image in images]",
        "images = [Image.fromarray(simplejpeg.decode_jpeg(jpeg)) for jpeg in jpegs]",
    ],
    "webp": [
        "for i, image in enumerate(images):",
        '    image.save(buffer := io.BytesIO(), "WEBP", quality={quality}, method=4)',
        "    images[i] = Image.open(buffer)",
    ],
}


def plain_code(
    folder: Path, head: StoredHead, spec: ModelSpec, encoder: PromptEncoder, base: str | None, *, at: Path
) -> str:
    """Python that prints the most probable class of clip.mp4.

    Args:
        folder: the export's, as the code names it. at: where it is now.
        base: what the code loads under the adapter; None where the folder has merged weights.
    """
    config = json.loads((at / HEADS_NAME / head.name / CONFIG_NAME).read_text(encoding="utf-8"))
    dtype = "torch.bfloat16" if spec.bf16 else "torch.float32"
    loaded = f'AutoModel.from_pretrained("{base or folder.name}", dtype={dtype})'
    if base is not None:
        loaded = f'PeftModel.from_pretrained({loaded}, "{folder.name}")'
    place = f"{folder.name}/{HEADS_NAME}/{head.name}"
    numbers = {"num_heads": config.get("num_heads"), "video_id": encoder.video_token_id}
    numbers["action_id"] = encoder.action_token_id
    lines = [
        f'tokenizer, model = AutoTokenizer.from_pretrained("{folder.name}"), {loaded}.eval()',
        *_frames(head.settings, spec, encoder),
        *_inputs(head, encoder),
        "with torch.no_grad():",
        "    hidden = model(input_ids=ids, pixel_values_videos=patches.to(model.dtype), video_grid_thw=grid,",
        f"                   mm_token_type_ids=(ids == {encoder.video_token_id}).int() * 2,",
        "                   second_per_grid_ts=torch.tensor([seconds])).last_hidden_state.to(model.dtype)",
        f'head, state = load_file("{place}/{WEIGHTS_NAME}"), hidden[:, -1]',
        HEADS[config["decoder_type"]].format(**numbers),
        f'names = json.load(open("{place}/{LABELS_NAME}", encoding="utf-8"))["names"]',
        "score, label = logits.double().softmax(-1)[0].max(0)",
        "print(names[label], float(score))",
    ]
    return "\n".join([*_imports(head.settings, peft=base is not None), "", *lines]) + "\n"


def _imports(settings: DecodeSettings, *, peft: bool) -> list[str]:
    return [
        "import io, json",
        f"import av, numpy as np, {'simplejpeg, ' if settings.codec == 'jpg' else ''}torch, torch.nn.functional as F",
        *(["from peft import PeftModel"] if peft else []),
        "from PIL import Image",
        "from safetensors.torch import load_file",
        "from transformers import AutoModel, AutoTokenizer",
        "from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize",
    ]


def _frames(settings: DecodeSettings, spec: ModelSpec, encoder: PromptEncoder) -> list[str]:
    """From the file to `images`, each as the model takes it, and `times`."""
    lines = [
        'frames = list(av.open("clip.mp4").decode(video=0))',
        "total, times = len(frames), [f.time for f in frames]",
    ]
    if settings.frames is not None:
        lines.append(f"count = {settings.frames}")
    else:
        lines.append("lasts = (times[-1] - times[0]) * total / max(1, total - 1)")
        most = f"min({settings.max_frames}, total)"
        lines.append(f"count = max(2, 2 * min(round(lasts * {settings.fps} / 2), {most} // 2))")
    lines.append("picked = [(2 * i + 1) * total // (2 * count) for i in range(count)]")
    used = spec.video_maxlen
    if settings.frames is not None:
        chosen = frame_choice(spec).evaluation(settings.frames, 0, 1)
        used = len(chosen)
        if chosen != list(range(settings.frames)):
            lines.append(f"picked = [picked[i] for i in {chosen}]")
    elif spec.frame_sampling == "dense":
        lines.append(f"if count > {used}:")
        lines.append(f"    stride = min({spec.dense_stride}, (count - 1) // {max(1, used - 1)})")
        lines.append(f"    start = (count - {used - 1} * stride - 1) // 2")
        lines.append(f"    picked = [picked[start + i * stride] for i in range({used})]")
    else:
        lines.append(f"if count > {used}:")
        lines.append(f"    picked = [picked[(2 * i + 1) * count // {2 * used}] for i in range({used})]")
    lines.append("images = [frames[i].to_image().rotate(frames[i].rotation, expand=True) for i in picked]")
    lines.append("width, height = images[0].size")
    if settings.max_pixels is not None:
        lines.append(f"height, width = smart_resize(height, width, {FACTOR}, {FACTOR**2}, {settings.max_pixels})")
    else:
        each = f"2 * round(side * {settings.short_side} / min(height, width) / 2)"
        lines.append(f"height, width = [{each} for side in (height, width)]")
    lines.append("images = [image.resize((width, height), Image.BICUBIC) for image in images]")
    lines += [line.format(quality=settings.quality) for line in STORE.get(settings.codec, [])]
    bounds = f"{encoder.min_pixels}, {encoder.image_max_pixels if used == 1 else encoder.max_pixels}"
    lines += [
        f"height, width = smart_resize(height, width, {encoder.geometry.factor}, {bounds})",
        "pixels = np.stack([image.resize((width, height), Image.BICUBIC) for image in images])",
    ]
    return lines


def _ids(prompt: str, encoder: PromptEncoder, count: str) -> list[str]:
    """The prompt as the text that its ids stand for; as ids, where the tokenizer would make others of the text: a
    prompt may spell what is a special token in the text."""
    merge, tokenizer = encoder.geometry.merge_size, encoder.tokenizer
    ids = encoder.encode(prompt, (1, merge, merge), 1.0).input_ids.tolist()
    at = ids.index(encoder.video_token_id)
    before, after = (
        tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for part in (ids[:at], ids[at + 1 :])
    )
    if tokenizer(f"{before}<|video_pad|>{after}").input_ids == ids:
        text = f"text = {before!r} + '<|video_pad|>' * ({count}) + {after!r}"
        return [text, 'ids = tokenizer(text, return_tensors="pt").input_ids']
    return [f"ids = torch.tensor([{ids[:at]} + [{encoder.video_token_id}] * ({count}) + {ids[at + 1 :]}])"]


def _inputs(head: StoredHead, encoder: PromptEncoder) -> list[str]:
    """From `pixels` to patches, grid, token ids and seconds."""
    patch, merge, steps = encoder.geometry.patch_size, encoder.geometry.merge_size, encoder.geometry.temporal_patch_size
    assert steps == 2, steps
    return [
        "pixels = np.concatenate([pixels, pixels[-1:]]) if len(pixels) % 2 else pixels",
        f"mean, std = torch.tensor({list(CLIP_MEAN)}), torch.tensor({list(CLIP_STD)})",
        "values = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(0, 3, 1, 2)",
        f"t, h, w = len(pixels) // 2, height // {patch}, width // {patch}",
        f"patches = values.reshape(t, 2, 3, h // {merge}, {merge}, {patch}, w // {merge}, {merge}, {patch})",
        "patches = patches.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).flatten(5).flatten(0, 4)",
        "grid = torch.tensor([[t, h, w]])",
        *_ids(head.prompt, encoder, f"t * h * w // {merge**2}"),
        "seconds = 2 * (times[picked[-1]] - times[picked[0]]) / max(1, len(picked) - 1)",
    ]
