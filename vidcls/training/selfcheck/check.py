"""The first steps prove that what should learn does: what trains, its gradients, the loss, and the first checkpoint.

Every finding is the same on all ranks, so that all of them stop.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NoReturn

import torch

from vidcls import distributed
from vidcls.data.batch import Batch
from vidcls.training.checkpoint import link_states
from vidcls.training.engine import Engine, StepResult
from vidcls.training.masters import is_stage3, trainable
from vidcls.training.optimizer import learning_rate
from vidcls.training.selfcheck.bias_gradient import Expected, ExpectedGradient, Losses, clipping, compare, tolerance
from vidcls.training.selfcheck.digest import FrozenWeights
from vidcls.training.selfcheck.gradients import GradientFlow, Reached, classifier_layer, whole_master, whole_moment
from vidcls.training.selfcheck.read_back import read_back
from vidcls.training.selfcheck.trained import intended_parameters, listed, trained_wrongly
from vidcls.training.setup import Run

MOST_READ_BACK = 10**9  # trained parameters; under ZeRO-3 reading back makes them whole on every rank
MOST_STEPS = 50  # a head whose clips do not come in so many is let go, and named
# The first loss may be this many standard deviations of the logits from what even labels give.
DEVIATIONS, SLACK = 4.0, 0.05


class SelfCheckError(RuntimeError):
    """Training does not do what it should; names the check, what it looked at, what was expected and found."""


class SelfCheck:
    """Watches a run from its first step, fresh or resumed, until every check is done; then `active` is False.

    Make it right after the engine, with Adam's state loaded on a resume. All ranks must make it and call all but
    `observe` together. Every method raises SelfCheckError, on all ranks; those that are done return a line to log.
    """

    def __init__(self, engine: Engine, run: Run, losses: Losses) -> None:
        """`losses`: the objective's, as ExpectedGradient takes it."""
        self.active = True
        self._engine, self._run, self._steps = engine, run, 0
        model: Any = engine.module
        intended = intended_parameters(model, run.spec.tuning, run.heads)
        self._agree("what trains", trained_wrongly(engine, intended))
        names = [name for name, _ in model.named_parameters() if name in intended]
        self._flow = GradientFlow(engine, names)
        self._trained = sum(int(getattr(p, "ds_numel", p.numel())) for _, p in trainable(model))
        zero_heads = run.config.model.action_decoder_init == "zeros"
        self._reached = Reached(model, names, zero_heads=zero_heads)
        self._without_gradient = set(names)
        self._parameters = dict(model.named_parameters())
        # The rest moves if its gradients reach the optimizer; these are what no adapter library looks after.
        self._unmoved = {
            name: whole_master(self._parameters[name]) for name in names if name.startswith(("heads.", "action_token."))
        }
        self._expected = ExpectedGradient(run.clips.sources, losses)
        self._biases = [f"heads.{name}.{classifier_layer(head)}.bias" for name, head in model.heads.items()]
        self._moments = [torch.zeros(len(self._unmoved[bias]), dtype=torch.float64) for bias in self._biases]
        if run.resume is not None:
            self._moments = [self._moment(bias) for bias in self._biases]
        self._unchecked = set(range(len(self._biases)))
        self._worst_gradient = 0.0
        self._batch: Batch | None = None
        self._observed: str | None = None
        self._clips_H = torch.zeros(len(self._biases))
        self._frozen = FrozenWeights(model, intended)

    def observe(self, batch: Batch, logits_BC: torch.Tensor) -> None:
        """A micro-batch of the step under way and its logits, detached, before backward. Never raises: the other
        ranks are on their way into backward."""
        try:
            if self._batch is None:
                self._batch = batch.clone().to(torch.device("cpu"))
            counted_B = (batch.weights_B > 0).cpu()
            self._clips_H += torch.bincount(batch.heads_B.cpu()[counted_B], minlength=len(self._clips_H))
            if not torch.isfinite(logits_BC).any(dim=1).all():
                self._observed = self._observed or "logits are not finite"
            elif self._unchecked:
                self._observed = self._observed or self._expected.add(batch, logits_BC)
        except Exception as error:
            self._observed = f"a micro-batch cannot be looked at: {error!r}"

    def after_step(self, step: int, result: StepResult) -> str | None:
        """Judge optimizer step `step` (0-based); returns a line for the log when everything has been judged."""
        where = f"step {step + 1}"
        self._steps += 1
        norm = float(result.grad_norm)
        nonzero, infinite = self._flow.in_backward()
        if infinite or not math.isfinite(norm):
            # Before the labels: a step without a finite gradient was skipped, and its optimizer has no state.
            self._fail("finite gradients", f"{where}: {_not_finite(infinite, norm)}")
        self._agree("labels", f"{where}: {self._observed}" if self._observed else None)
        link_states(self._engine)
        clips_H = distributed.all_sum(self._clips_H.to(self._engine.device)).tolist()
        rates = [group["lr"] for group in self._engine.optimizer.param_groups]
        self._check_gradients(where, self._reached.step(clips_H, max(rates)), nonzero)
        if self._unchecked:
            gradients, chance = self._expected.over_ranks()
            if self._steps == 1:
                self._check_first_loss(where, result, chance)
            self._check_biases(where, gradients, clips_H, norm)
        self._check_moves(where, step)
        if self._steps == 1:
            self._frozen.take_new()
        self._flow.clear()
        self._expected.clear()
        self._clips_H.zero_()
        if not (self._without_gradient or self._unmoved or self._unchecked) or self._steps == MOST_STEPS:
            line = self._line()
            self.active = False
            self._flow.remove()
            del self._flow, self._expected, self._unmoved  # nothing of it is needed for the rest of the run
            return line
        return None

    def after_first_save(self, folder: Path) -> str | None:
        """Read the run's first checkpoint back. With averaged weights call it while they are applied."""
        assert self._batch is not None, "no step was observed"
        if is_stage3(self._engine) and self._trained > MOST_READ_BACK:
            self._batch = None
            return f"self-check: {folder.name} is not read back: all ranks would hold {self._trained:,} weights whole"
        wrong = read_back(self._engine, folder, self._run.spec, self._batch)
        self._batch = None
        if wrong:
            self._fail("save and load", wrong)
        return f"self-check passed: {folder.name} reads back bit by bit, and gives the same logits"

    def at_end(self) -> str | None:
        """Whether anything frozen has changed since the start."""
        changed = self._frozen.changed()
        wrong = f"{listed(changed)} differ from the start on rank {distributed.rank()}" if changed else None
        self._agree("frozen weights", wrong and f"{wrong}; likely reason: something wrote to them in place")
        if self.active:
            return self._line()
        return None

    def _check_gradients(self, where: str, reached: set[str], nonzero: set[str]) -> None:
        due = self._without_gradient & reached
        if not due:
            return
        in_optimizer = self._flow.in_optimizer()
        if lost := [name for name in self._flow.names if name in due - nonzero]:
            self._fail(
                "gradients",
                f"{where}: {listed(lost)} get no gradient: it is 0 on all ranks; likely reason: they are cut off from "
                "the loss (detached, or not used), or what is above them is 0",
            )
        if lost := [name for name in self._flow.names if name in due - in_optimizer]:
            self._fail(
                "gradients",
                f"{where}: {listed(lost)} have a gradient in backward, but Adam's first moment is 0; likely reason: "
                "the optimizer holds other tensors than the model",
            )
        self._without_gradient -= due

    def _check_first_loss(self, where: str, result: StepResult, chance: torch.Tensor) -> None:
        """A new head knows nothing of the labels: its loss is that of labels drawn evenly, ln(classes) where its
        logits are even, more where they spread (by half their variance)."""
        if not _starts_uninformed(self._run):
            return
        found = distributed.all_sum(result.loss.detach().clone()).item() / distributed.world_size()
        expected, uniform, variance = chance.tolist()
        allowed = DEVIATIONS * math.sqrt(variance) + SLACK
        if not abs(found - expected) <= allowed:
            self._fail(
                "first loss",
                f"{where}: it is {found:.4g}; expected {expected:.4g} +- {allowed:.2g} (ln of the classes is "
                f"{uniform:.4g}); likely reason: the loss is scaled, over other classes, or the labels leak",
            )

    def _check_biases(self, where: str, gradients: list[Expected], clips_H: list[float], norm: float) -> None:
        optim = self._run.config.optim
        factor = clipping(norm, optim.max_grad_norm)
        micro_batches = self._expected.micro_batches
        limit = tolerance(optim.bf16, micro_batches * distributed.world_size())
        for head, bias in enumerate(self._biases):
            moment_C = self._moment(bias)
            # Adam: new = beta1 * old + (1 - beta1) * gradient.
            found_C = (moment_C - optim.adam_beta1 * self._moments[head]) / (1 - optim.adam_beta1)
            self._moments[head] = moment_C
            expected = gradients[head].times(factor)
            if head not in self._unchecked or not clips_H[head] or not expected.decides(limit):
                continue
            if wrong := compare(found_C, expected, limit, micro_batches=micro_batches):
                self._fail("the classifier's gradient", f"{where}: {bias}: {wrong}")
            difference_C = (found_C - expected.by_shift_VC[0]).abs() / expected.terms_C.clamp(min=1e-12)
            self._worst_gradient = max(self._worst_gradient, difference_C.max().item())
            self._unchecked.discard(head)

    def _rate(self, name: str, step: int) -> float:
        """The learning rate that a head's parameter or <ACTION> should have in this step, by the recipe."""
        optim = self._run.config.optim
        scale = optim.head_lr_scale if name.startswith("heads.") else optim.action_token_lr_scale
        return scale * learning_rate(step, self._run.steps, optim)

    def _check_moves(self, where: str, step: int) -> None:
        """fp32 masters, because rounding to bf16 can hide a step. Where a step is below even their resolution, as
        that of a norm's ones in a long warm-up, wait for a larger one."""
        for name in sorted(self._unmoved.keys() - self._without_gradient):
            start, rate = self._unmoved[name], self._rate(name, step)
            if rate / 2 <= 2.0**-24 * start.abs().min().item():
                continue
            if torch.equal(whole_master(self._parameters[name]), start):
                self._fail(
                    "head and token move",
                    f"{where}: {name} is bit by bit what it was at the start, with a gradient and learning rate "
                    f"{rate:.3g}; likely reason: its group of the optimizer is not stepped",
                )
            del self._unmoved[name]

    def _moment(self, name: str) -> torch.Tensor:
        return whole_moment(self._parameters[name]).double()

    def _line(self) -> str:
        left = []
        if self._without_gradient:
            left.append(f"gradients of {listed(sorted(self._without_gradient))}")
        if self._unmoved:
            left.append(f"moves of {listed(sorted(self._unmoved))}")
        if self._unchecked:
            left.append(f"the classifier's gradient of {', '.join(self._biases[head] for head in self._unchecked)}")
        frozen = f"{self._frozen.elements:,} frozen weights digested in {self._frozen.seconds:.1f} s"
        if self._frozen.unread:
            frozen += f" (not {listed(self._frozen.unread)}, offloaded)"
        if left:
            return f"self-check: not judged in {self._steps} steps: {'; '.join(left)}; {frozen}"
        within = f"within {100 * self._worst_gradient:.2g} %"
        return (
            f"self-check passed: {len(self._flow.names)} trained parameters get gradients by step {self._steps}, "
            f"heads and <ACTION> move, labels and classifier gradients are right ({within}); {frozen}"
        )

    def _agree(self, check: str, wrong: str | None) -> None:
        """Raise on all ranks when one has found something. All ranks must call it."""
        for found in distributed.gather_objects(wrong):
            if found is not None:
                self._fail(check, found)

    @staticmethod
    def _fail(check: str, wrong: str) -> NoReturn:
        raise SelfCheckError(f"self-check failed: {check}: {wrong}")


def _not_finite(parameters: set[str], norm: float) -> str:
    if not parameters:
        return f"the gradient norm is {norm}, though each gradient is finite; likely reason: their sum overflows"
    return (
        f"the gradients of {listed(sorted(parameters))} are not finite; likely reason: a weight or an input that "
        "is not finite, or a loss without a finite slope"
    )


def _starts_uninformed(run: Run) -> bool:
    """Whether the heads are new and the loss is plain cross-entropy, which smoothing and mixing do not change."""
    model, optim = run.config.model, run.config.optim
    return (
        run.resume is None
        and model.action_decoder_init in ("normal", "zeros")
        and model.action_decoder_path is None
        and model.adapter_name_or_path is None
        and optim.loss_type == "cross_entropy"
        and optim.class_balance_beta == 0
        and optim.lm_loss_weight == 0
    )
