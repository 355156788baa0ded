"""Bytes that autograd keeps of a micro-batch from forward to backward, and what a moment needs besides.

What is kept follows vidcls/model/{layers,adapters,attention}.py: of layers with LoRA the input, the dropout mask and
the low-rank output; of SwiGLU its two inputs; of attention queries, keys and values, and where it is written out its
weights. A frozen tower keeps nothing.
"""

from __future__ import annotations

from vidcls.planning.workload import Block, Projection, Workload

FLOAT = 4


def kept(work: Workload) -> float:
    """Bytes that wait for backward when forward is done."""
    total = 0.0
    for block in work.blocks:
        if block.has_backward:
            total += (block.count - block.checkpointed) * _layer(block, work)
            total += block.checkpointed * block.rows * block.layers.width * work.value_bytes
    total += sum(_inputs(projection, work) for projection in work.around if projection.has_backward)
    return total + _between(work)


def again(work: Workload) -> float:
    """Bytes of the largest layer that gradient checkpointing computes again, which it then has in full."""
    return max((_layer(block, work) for block in work.blocks if block.checkpointed), default=0.0)


def working_set(work: Workload) -> float:
    """Bytes beside what is kept at the worst moment of backward: gradients of a layer's widest inputs and outputs."""
    return max(_working(block, work) for block in work.blocks if block.has_backward)


def tower_working_set(work: Workload) -> float:
    """Bytes of the tower's forward at its worst moment: pixels as bytes, as float32 and in the model's dtype, or a
    block of layers. Of a frozen tower all of it is free again before anything of the language model is kept."""
    blocks = [block for block in work.blocks if block.name == "vision"]
    if not blocks:
        return 0.0
    pixels = blocks[0].rows * work.model.patch_values * (1 + FLOAT + work.value_bytes)
    return max(pixels, *(_working(block, work) for block in blocks))


def _layer(block: Block, work: Workload) -> float:
    size, width = work.value_bytes, block.layers.width
    rows, read = block.rows, block.read
    found = sum(_inputs(projection, work) for projection in block.projections)
    full = any(layer.trains for projection in block.projections for layer in projection.layers)
    if full or work.gathered:  # transformers' own norm
        found += (rows + read) * width * (FLOAT + (size if full else 0))
    else:
        found += (rows + read) * (width * size + FLOAT)
    attention = block.attention
    found += (attention.queries * width + 2 * attention.tokens * block.layers.kv_width) * size
    if work.fused_attention:
        shares_output = attention.queries == read  # else what it keeps is unfolded
        has_output = any(p.name in ("o", "proj") and _inputs(p, work) for p in block.projections) and shares_output
        found += attention.queries * (attention.heads * FLOAT + (0 if has_output else width * size))
    else:
        found += attention.scores * size
    return found + 2 * read * block.layers.inner * size


def _inputs(projection: Projection, work: Workload) -> float:
    """What linear layers on one input keep of it."""
    size, values = work.value_bytes, projection.rows * projection.inner
    low = projection.rows * projection.ranks * size
    trained = any(layer.trains for layer in projection.layers)
    adapted = sum(layer.rank > 0 for layer in projection.layers)
    if not adapted:
        return values * size if trained or work.gathered else 0.0
    if not work.plain_layers:
        return values * size * (2 if work.dropout else 1) + low
    # PEFT: a mask and the dropped input for each layer; DeepSpeed's linear layer keeps the input of frozen ones too.
    own = adapted * values * (size + work.mask_bytes) if work.dropout else values * size
    # DoRA: what it makes of each layer's output, in three factors.
    outputs = 3 * sum(projection.rows * layer.outer * size for layer in projection.layers) if work.dora else 0
    return own + (values * size if work.gathered and work.dropout else 0) + low + outputs


def _between(work: Workload) -> float:
    """Rotary tables, masks of the kinds of tokens, and the last norm; in a tower that trains, what its merger keeps."""
    text, size = work.model.text, work.value_bytes
    last = work.blocks[-1]
    found = work.tokens * (2 * text.head_width * size + 1) + last.read * (text.width * size + FLOAT)
    if work.vision_trains:
        patches = work.clips.count * work.clips.video_tokens(work.model) * work.model.merge**2
        found += patches * (2 * work.model.vision.head_width * FLOAT)
        found += patches * work.model.vision.width * size * 2  # the merger's norm, and what its GELU keeps
    return found


def _working(block: Block, work: Workload) -> float:
    size, layers = work.value_bytes, block.layers
    swiglu = 5 * block.read * layers.inner * size  # two gradients, and the parts of them
    narrow = 4 * block.rows * layers.width * size
    # Of one kind of pieces at a time: gradients of the weights, of the scores, and of the scores before their scale.
    scores = 0 if work.fused_attention else 3 * block.attention.scores * size
    return max(swiglu, scores) + narrow
