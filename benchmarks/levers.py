"""What each lever of a step is worth: forward and backward with it, and without it.

    python benchmarks/levers.py --shape 3b --model DIR [--rounds 3]
    python benchmarks/levers.py --shape tiny

One process, one model (random weights), one batch in memory, no DeepSpeed. A lever is taken away by what it replaced:
transformers' or PEFT's own forward, torch's own operation, or the work that is left out done after all. In every round
the step as it is comes before each step without a lever, and the two are compared; what is taken away again and again
is worth less together than the sum of the gains.
"""

import contextlib
import itertools
import tempfile
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from bare_loop import micro_batches, timed
from rounds import RESULTS, Ratio, Spread, conditions, table, write_json
from throughput import PACKAGES, Bench, options
from torch import nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

from vidcls import distributed
from vidcls.config import load_config
from vidcls.data.batch import Batch
from vidcls.model import adapters, attention, layers
from vidcls.model.classifier import ActionClassifier
from vidcls.model.prepacking import ATTRIBUTE
from vidcls.model.pretrained import TrainingExtras, build_model
from vidcls.training.prepacking import prepack_weights
from vidcls.training.setup import Run, setup

Without = Callable[[ActionClassifier], contextlib.AbstractContextManager[Any]]


@contextlib.contextmanager
def own_forwards(modules: list[Any]) -> Iterator[None]:
    """transformers' forwards instead of those that `speed_up` has put in."""
    ours = [vars(module).pop("forward") for module in modules]
    try:
        yield
    finally:
        for module, forward in zip(modules, ours, strict=True):
            module.forward = forward


@contextlib.contextmanager
def recomputed(model: ActionClassifier) -> Iterator[None]:
    """gradient_checkpointing."""
    language: Any = model.inner.language_model
    language.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        language.activation_checkpointing_disable()


@contextlib.contextmanager
def vocabulary_logits(model: ActionClassifier) -> Iterator[None]:
    """At every position of the row: the embedding's matrix has the size of the language head's."""
    language = model.inner.language_model

    def multiply(module: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        tokens = kwargs["inputs_embeds"].detach()
        F.linear(tokens, module.embed_tokens.weight)

    handle = language.register_forward_hook(multiply, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def whole_last_layer(model: ActionClassifier) -> Iterator[None]:
    last: Any = model.inner.language_model.layers[-1]

    def forward(self: Any, hidden_states: torch.Tensor, *, pieces: Any, lasts_only: bool, **rest: Any) -> torch.Tensor:
        return type(self).forward(self, hidden_states, pieces=pieces, **rest)[:, pieces.lasts]

    with patch.object(last, "forward", types.MethodType(forward, last)):
        yield


def every_prefix(model: ActionClassifier) -> Any:
    return patch.object(model, "share_prefix", False)


@contextlib.contextmanager
def second_team(model: ActionClassifier) -> Iterator[None]:
    """A thread that has computed with torch, and stays."""
    done = threading.Event()

    def compute() -> None:
        torch.ones(10**7).sum()
        done.wait()

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def fused_attention(q: Any, k: Any, v: Any, scale: float, *, causal: bool) -> torch.Tensor:
    shared = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=shared)


def called(x: torch.Tensor, modules: Any) -> tuple[torch.Tensor, ...]:
    """PEFT's own forward of each layer."""
    return tuple(module(x) for module in modules)


@contextlib.contextmanager
def plain_weights(model: ActionClassifier) -> Iterator[None]:
    """Frozen weights as the checkpoint has them alone."""
    modules: list[Any] = [module for module in model.inner.modules() if ATTRIBUTE in vars(module)]
    kept = [vars(module).pop(ATTRIBUTE) for module in modules]
    try:
        yield
    finally:
        for module, made in zip(modules, kept, strict=True):
            setattr(module, ATTRIBUTE, made)


def norms(model: ActionClassifier) -> list[Any]:
    return [module for module in model.inner.modules() if isinstance(module, Qwen2_5_VLRMSNorm)]


def plain_swiglu(model: ActionClassifier) -> Any:
    return patch.object(layers._SwiGlu, "apply", lambda gate, up: F.silu(gate) * up)


def plain_mask(x_NK: torch.Tensor, p: float) -> torch.Tensor:
    return torch.empty_like(x_NK).bernoulli_(1 - p)


LEVERS: dict[str, Without] = {
    "no logits of the vocabulary": vocabulary_logits,
    "nothing recomputed (gradient_checkpointing: false)": recomputed,
    "last layer only where it is read": whole_last_layer,
    "prompts' common beginning once (share_prefix)": every_prefix,
    "adapters on one input together": lambda model: patch.object(layers, "project", called),
    "of it, dropout masks of 16 bits": lambda model: patch.object(adapters, "_keep_mask", plain_mask),
    "attention written out (on a CPU)": lambda model: patch.object(attention, "_plain", fused_attention),
    "frozen weights prepacked (prepack_weights, on a CPU)": plain_weights,
    "RMSNorm that keeps its input alone": lambda model: own_forwards(norms(model)),
    "SwiGLU that keeps its inputs alone": plain_swiglu,
    "patch embedding as a matrix product": lambda model: own_forwards([model.inner.visual.patch_embed]),
    "no thread beside that computes (on a CPU)": second_team,
}
CACHE = "vision cache (vision_cache)"  # not in the step as it is
AS_IT_IS = "as it is"


def training_step(model: ActionClassifier, batch: Batch, trained: list[nn.Parameter]) -> Callable[[], None]:
    """Forward and backward."""

    def step() -> None:
        F.cross_entropy(model(**batch.model_inputs()), batch.labels_B).backward()
        for parameter in trained:
            parameter.grad = None

    return step


def measure(run: Run, rounds: int) -> tuple[list[Ratio], dict[str, list[float]]]:
    """What the step without each lever takes over the step as it is, and all seconds."""
    extras = TrainingExtras(gradient_checkpointing=False)
    model = build_model(run.spec, run.encoder, run.heads, seed=run.config.run.seed, extras=extras)
    model.to(distributed.device()).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batch = next(micro_batches(run))
    step = training_step(model, batch, trained)
    step()
    prepack_weights(run.config, model)
    step()
    features_VD = model.encode_video(batch.frames, batch.grid_thw)
    seconds: dict[str, list[float]] = {name: [] for name in (AS_IT_IS, *LEVERS, CACHE)}
    gains: dict[str, list[float]] = {name: [] for name in (*LEVERS, CACHE)}
    for _, name in itertools.product(range(rounds), gains):
        seconds[AS_IT_IS].append(timed(step))
        if name == CACHE:
            change: Any = patch.object(ActionClassifier, "encode_video", lambda *_: features_VD)
        else:
            change = LEVERS[name](model)
        with change:
            step()
            seconds[name].append(timed(step))
        gain = seconds[name][-1] / seconds[AS_IT_IS][-1]
        gains[name].append(1 / gain if name == CACHE else gain)
    return [Ratio(name, Spread.of(values)) for name, values in gains.items()], seconds


def main() -> None:
    parser = options()
    parser.description, parser.usage = __doc__, "levers.py [options of throughput.py]"
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="levers_") as folder:
        bench = Bench(args, Path(folder))
        recipe, *words = bench.words(Path(folder) / "run", 100)
        run = setup(load_config(recipe, words))
        ratios, seconds = measure(run, args.rounds)
        distributed.stop()
    now = Spread.of(seconds[AS_IT_IS])
    rows = [(each.name, Spread.of(seconds[each.name]), each.ratio) for each in ratios]
    table(f"{args.shape}: a step takes {now} s", ("lever", "seconds without it (the cache: with it)", "gain"), rows)
    result = {
        "conditions": conditions(*PACKAGES),
        "options": {k: str(v) for k, v in vars(args).items()},
        "seconds": seconds,
        "gains": ratios,
    }
    write_json(RESULTS / f"{args.name or f'levers_{args.shape}'}.json", result)


if __name__ == "__main__":
    main()
