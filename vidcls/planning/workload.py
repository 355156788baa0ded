"""What one rank computes at a time, in sizes: a micro-batch of clips that are all alike, and what trains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from vidcls.config import Config
from vidcls.model.shapes import Architecture, Layers
from vidcls.options import ATTENTION_SIZE, spared_tokens, sums_locally

Tuning = Literal["frozen", "lora", "full"]


@dataclass(frozen=True)
class Clips:
    """`count` clips in a micro-batch: frames, height and width of each in pixels, and the tokens of its text.
    answers: tokens of an answer that is learned, at the end of the text. prefix: of the text, what all of them begin
    with, to be computed once where it pays."""

    count: int
    frames: int
    height: int
    width: int
    text_tokens: int
    answers: int = 0
    prefix: int = 0

    @property
    def pixel_bytes(self) -> int:
        """Of one clip as it is loaded."""
        return 3 * self.frames * self.height * self.width

    def grid(self, model: Architecture) -> tuple[int, int, int]:
        """Of a clip: steps in time (an odd last frame counts twice), and tokens along height and width."""
        side = model.patch_size * model.merge
        return -(-self.frames // model.temporal_patch), self.height // side, self.width // side

    def video_tokens(self, model: Architecture) -> int:
        t, h, w = self.grid(model)
        return t * h * w

    def length(self, model: Architecture) -> int:
        """Tokens of a clip in the language model."""
        return self.video_tokens(model) + self.text_tokens

    def row(self, model: Architecture) -> int:
        """Tokens that the language model computes."""
        tokens = self.count * self.length(model)
        return tokens - spared_tokens(self.count, self.prefix, tokens)

    def frame_lengths(self, model: Architecture) -> Counter[int]:
        """How many pieces of how many patches the tower's full attention has."""
        t, h, w = self.grid(model)
        return Counter({h * w * model.merge**2: t * self.count})

    def window_lengths(self, model: Architecture) -> Counter[int]:
        """The same of the windows; those at the edges are smaller."""
        t, h, w = self.grid(model)
        lengths: Counter[int] = Counter()
        for rows in _cuts(h, model.window):
            for columns in _cuts(w, model.window):
                lengths[rows * columns * model.merge**2] += t * self.count
        return lengths


def _cuts(side: int, window: int) -> Iterator[int]:
    yield from [window] * (side // window)
    if side % window:
        yield side % window


@dataclass(frozen=True)
class Linear:
    """A linear layer [inner -> outer] and how it is tuned; rank: of its LoRA, 0 without."""

    inner: int
    outer: int
    rank: int = 0
    trains: bool = False
    bias: bool = False

    @property
    def trained_tensors(self) -> int:
        return (1 + self.bias if self.trains else 0) + (2 if self.rank else 0)

    @property
    def trained_weights(self) -> int:
        own = self.inner * self.outer + (self.outer if self.bias else 0) if self.trains else 0
        return own + self.rank * (self.inner + self.outer)


@dataclass(frozen=True)
class Projection:
    """Linear layers on one input of `rows` rows. name: for tables. needs_grad: whether its input has a gradient."""

    name: str
    rows: int
    layers: tuple[Linear, ...]
    needs_grad: bool = True

    @property
    def inner(self) -> int:
        return self.layers[0].inner

    @property
    def ranks(self) -> int:
        return sum(layer.rank for layer in self.layers)

    @property
    def has_backward(self) -> bool:
        return self.needs_grad or any(layer.rank or layer.trains for layer in self.layers)


@dataclass(frozen=True)
class Attention:
    """pieces: how many of which length. rows: that ask in each piece; None: all. trains: it has a backward."""

    heads: int
    kv_heads: int
    head_width: int
    pieces: tuple[tuple[int, int], ...]
    rows: int | None
    causal: bool
    trains: bool

    @property
    def tokens(self) -> int:
        """Of all pieces."""
        return sum(count * length for length, count in self.pieces)

    @property
    def queries(self) -> int:
        return self.tokens if self.rows is None else sum(count * self.rows for _, count in self.pieces)

    @property
    def scores(self) -> int:
        """Of all heads."""
        return self.heads * sum(count * length * (self.rows or length) for length, count in self.pieces)


@dataclass(frozen=True)
class Block:
    """`count` equal layers. rows: that come in. read: of them, those that all but keys and values are computed for."""

    name: str
    count: int
    layers: Layers
    rows: int
    read: int
    projections: tuple[Projection, ...]
    attention: Attention
    has_backward: bool
    checkpointed: int  # of the count: computed again in backward


@dataclass(frozen=True)
class Workload:
    """A micro-batch through one model: its layers, what stands around them, and the numbers that train.

    fused_attention: torch's fused kernels or flash attention (a GPU); on a CPU attention that trains is written out.
    plain_layers: LoRA as PEFT computes it (under ZeRO-3 and with DoRA), not as model/adapters.py does. gathered: layers
    gather their weights, which are partitioned (ZeRO-3). summed: gradients are, on each rank, over a step's
    micro-batches (training/reduction.py). mask_bytes: of a value in a dropout mask of torch's own.
    """

    model: Architecture
    clips: Clips
    blocks: tuple[Block, ...]
    around: tuple[Projection, ...]
    trained: int
    trained_tensors: int
    largest_layer: int  # weights of the largest layer, with its adapters
    dropout: float
    fused_attention: bool
    plain_layers: bool
    dora: bool
    gathered: bool
    summed: bool
    mask_bytes: int
    vision_trains: bool
    bf16: bool

    @property
    def tokens(self) -> int:
        return self.clips.row(self.model)

    @property
    def value_bytes(self) -> int:
        return 2 if self.bf16 else 4

    @classmethod
    def of(
        cls,
        config: Config,
        model: Architecture,
        clips: Clips,
        classes: tuple[int, ...],
        *,
        on_gpu: bool,
        stage: int,
    ) -> Workload:
        """`classes`: of each head."""
        options = config.model
        language: Tuning = "frozen" if options.finetuning_type == "freeze" else options.finetuning_type
        blocks = _vision_blocks(config, model, clips) if config.data.vision_cache is None else ()
        blocks += _text_blocks(config, model, clips, language)
        around = _around(config, model, clips, classes)
        linear = [(block.count, projection) for block in blocks for projection in block.projections]
        linear += [(1, projection) for projection in around]
        trained = sum(count * layer.trained_weights for count, p in linear for layer in p.layers)
        trained += model.text.width  # <ACTION>
        if language == "full":
            trained += model.text.width * (2 * model.text.count + 1)  # norms
        if options.vision_tuning == "full":
            trained += 2 * model.vision.width * model.vision.count
        if options.merger_tuning == "full":
            trained += model.vision.width
        if options.action_decoder_type == "attention":
            trained += len(classes) * (4 * model.text.width + 2 * _head_width(config, model))
        if options.use_dora:
            trained += sum(count * layer.outer for count, p in linear for layer in p.layers if layer.rank)
        largest = max(
            sum(layer.inner * layer.outer + layer.trained_weights for p in block.projections for layer in p.layers)
            for block in blocks
        )
        return cls(
            model=model,
            clips=clips,
            blocks=blocks,
            around=around,
            trained=trained,
            trained_tensors=sum(count * layer.trained_tensors for count, p in linear for layer in p.layers),
            largest_layer=largest,
            dropout=options.lora_dropout if config.has_lora else 0.0,
            fused_attention=on_gpu and options.flash_attn not in ("eager", "disabled"),
            plain_layers=stage == 3 or options.use_dora,
            dora=options.use_dora,
            gathered=stage == 3,
            summed=sums_locally(trained, stage, config.zero["zero_optimization"]),
            mask_bytes=1 if on_gpu else 2 if config.optim.bf16 else 4,
            vision_trains=options.vision_tuning != "frozen" or options.merger_tuning != "frozen",
            bf16=config.optim.bf16,
        )


def _linear(inner: int, outer: int, tuning: Tuning, rank: int, *, bias: bool = False) -> Linear:
    return Linear(inner, outer, rank if tuning == "lora" else 0, tuning == "full", bias)


def _text_blocks(config: Config, model: Architecture, clips: Clips, tuning: Tuning) -> tuple[Block, ...]:
    """All layers but the last, and the last one, which may be computed for one token a clip."""
    text, length = model.text, clips.length(model)
    options = config.model
    lasts_only = options.action_decoder_type != "attention" and not clips.answers
    tokens = clips.row(model)

    def layer(name: str, inner: int, outer: int, *, bias: bool = False) -> Linear:
        targeted = options.lora_target == "all" or name in options.lora_target
        return _linear(inner, outer, tuning, options.lora_rank if targeted else 0, bias=bias)

    d, kv = text.width, text.kv_width
    q = layer("q_proj", d, d, bias=True)
    k, v = (layer(name, d, kv, bias=True) for name in ("k_proj", "v_proj"))
    o = layer("o_proj", d, d)
    gate, up = (layer(name, d, text.inner) for name in ("gate_proj", "up_proj"))
    down = layer("down_proj", text.inner, d)

    def block(count: int, *, last: bool) -> Block:
        read = clips.count if last else tokens
        inputs = (
            (Projection("k, v", tokens, (k, v)), Projection("q", read, (q,)))
            if last
            else (Projection("q, k, v", tokens, (q, k, v)),)
        )
        rest = (
            Projection("o", read, (o,)),
            Projection("gate, up", read, (gate, up)),
            Projection("down", read, (down,)),
        )
        attention = Attention(
            text.heads,
            text.kv_heads,
            text.head_width,
            ((length, clips.count),),
            rows=1 if last else None,
            causal=not last,
            trains=True,
        )
        # The forward of the very last layer is replaced where checkpointing would stand.
        again = 0 if last or not options.gradient_checkpointing else text.count - 1
        return Block("language", count, text, tokens, read, inputs + rest, attention, True, again)

    if not lasts_only:
        return (block(text.count, last=False),)
    others = (block(text.count - 1, last=False),) if text.count > 1 else ()
    return (*others, block(1, last=True))


def _vision_blocks(config: Config, model: Architecture, clips: Clips) -> tuple[Block, ...]:
    """By kind of attention; the first apart, whose input has no gradient unless the patch embedding trains."""
    vision, tuning, rank = model.vision, config.model.vision_tuning, config.model.lora_rank
    rows = clips.count * clips.video_tokens(model) * model.merge**2
    v = vision.width
    layers = (
        ("qkv", (_linear(v, 3 * v, tuning, rank, bias=True),)),
        ("proj", (_linear(v, v, tuning, rank, bias=True),)),
        ("gate, up", tuple(_linear(v, vision.inner, tuning, rank, bias=True) for _ in range(2))),
        ("down", (_linear(vision.inner, v, tuning, rank, bias=True),)),
    )
    trains, again = tuning != "frozen", config.model.gradient_checkpointing
    unread = tuning == "lora" and not again  # the gradient of the first input; checkpointing has inputs require one

    def block(count: int, pieces: Counter[int], *, first: bool) -> Block:
        projections = tuple(
            Projection(name, rows, group, needs_grad=trains and not (first and name == "qkv" and unread))
            for name, group in layers
        )
        attention = Attention(
            vision.heads,
            vision.heads,
            vision.head_width,
            tuple(pieces.items()),
            rows=None,
            causal=False,
            trains=trains,
        )
        return Block(
            "vision", count, vision, rows, rows, projections, attention, trains, count if trains and again else 0
        )

    windows, frames = clips.window_lengths(model), clips.frame_lengths(model)
    windowed = vision.count - model.full_blocks
    kinds = [(1, windows, True), (windowed - 1, windows, False), (model.full_blocks, frames, False)]
    return tuple(block(count, pieces, first=first) for count, pieces, first in kinds if count)


def _around(config: Config, model: Architecture, clips: Clips, classes: tuple[int, ...]) -> tuple[Projection, ...]:
    """Patch embedding, merger and heads."""
    options = config.model
    tokens = clips.count * clips.video_tokens(model)
    found: list[Projection] = []
    if config.data.vision_cache is None:
        patch = _linear(model.patch_values, model.vision.width, options.vision_tuning, 0)
        found.append(Projection("patches", tokens * model.merge**2, (patch,), needs_grad=False))
        merger, rank = options.merger_tuning, options.lora_rank
        trains = options.vision_tuning != "frozen"
        # A norm before it trains with the merger.
        first = _linear(model.merged, model.merged, merger, rank, bias=True)
        second = _linear(model.merged, model.text.width, merger, rank, bias=True)
        found.append(Projection("merger", tokens, (first,), needs_grad=trains or merger == "full"))
        found.append(Projection("merger", tokens, (second,), needs_grad=trains or merger != "frozen"))
    width = model.text.width
    for count in classes:
        inner = _head_width(config, model)
        rows: list[tuple[int, int, int]]  # rows, inner, outer
        if options.action_decoder_type == "linear":
            rows = [(clips.count, width, count)]
        elif options.action_decoder_type == "mlp":
            rows = [(clips.count, width, inner), (clips.count, inner, count)]
        else:
            read = clips.count * clips.length(model)
            found.append(Projection("head", read, (Linear(width, inner, trains=True),)))  # keys have no bias
            rows = [(clips.count, width, inner), (read, width, inner)]
            rows += [(clips.count, inner, inner), (clips.count, inner, count)]
        for number, wide, outer in rows:
            found.append(Projection("head", number, (Linear(wide, outer, trains=True, bias=True),)))
    if clips.answers:
        answers = clips.count * clips.answers
        # Its loss is an autograd function that computes the gradient of the hidden states in forward.
        found.append(Projection("answers", answers, (Linear(width, model.vocabulary),)))
    return tuple(found)


def _head_width(config: Config, model: Architecture) -> int:
    wide = model.text.width
    default = wide if config.model.action_decoder_type == "mlp" else min(ATTENTION_SIZE, wide)
    return config.model.action_decoder_hidden_size or default
