"""Fixes: the smallest changes of a run that ran out of memory that would have fitted, each predicted.

A prediction is held against the room that the run had, and corrected by what was measured of the run:
where it held more than was predicted of it, so will a changed run. That the run as it is does not fit is
known whatever is predicted. Of each option the least change that fits is looked for, first of those that
keep the training's mathematics; where none of them suffices alone, several together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from .. import techniques
from ..advice import OF_WORKLOAD, script_lines
from ..categories import Category
from ..config import RunConfig, UserError, Value, show
from ..events import Environment, Phase, StepTrace
from ..prediction.advice import LEAST_SAVING_BYTES, could_help
from ..prediction.gpus import Gpu, gpu_of
from ..prediction.outcome import Prediction
from ..prediction.outcome import Verdict as Outcome
from ..prediction.search import largest
from ..run import Run, RunKind
from ..technique import Effect, Technique
from .report import Fix, OutOfMemoryReport, Verdict

Predict = Callable[[RunConfig, Gpu], Prediction]
Settings = Mapping[str, Value]

MEASURED_SHARE = 0.015
"""Share of the peak that is left free: peaks corrected by what was measured come out within 0.3 %, but gaps do not.

With 0.3 %, 4 of 22 first fixes ended in gaps on an H100, where the model's layout had just gone through.
"""

EXPANDABLE: Settings = {"allocator": "expandable-segments"}
"""Segments that grow, which leave next to no gaps."""

OF_A_GPU = "predicted with a GPU's kernels"
"""Said of each figure where the run itself was on a CPU, whose kernels take other buffers."""

COST_OF_WORKLOAD = {"batch_size": "more steps for as many rows", "seq_len": "longer rows are cut"}


def gpu_with_room(environment: Environment, report: OutOfMemoryReport) -> Gpu:
    """The GPU that changes are predicted for: a run's, with the memory that torch could have had there.

    Args:
        environment: Where the run was; of a CPU the kernels are taken for those of the usual GPU.
        report: What the run had in torch, and what was free.
    """
    room = report.allocated_bytes + report.cached_bytes + report.free_bytes
    return replace(
        gpu_of(environment),
        memory_bytes=room,
        context_bytes=0,
        unmodelled_share=MEASURED_SHARE,
        unmodelled_bytes=0,
    )


class Ladder(NamedTuple):
    """The values of one option, from the strongest change to the least.

    Attributes:
        name: The option.
        effect: On what is computed, of each value.
        rungs: Settings of each value.
        ordered: Whether each rung is known to need more memory than the one before; else only predicting tells.
        slowdown: See `Technique`.
    """

    name: str
    effect: Effect
    rungs: tuple[Settings, ...]
    ordered: bool = False
    slowdown: float = 0.0


class FixSearch:
    """A search for what would fit, to be iterated over once: each fix comes as soon as it is known, the best first.

    If nothing fits, the only one is what comes nearest.

    Args:
        run: That ran out of memory.
        report: Of that moment.
        predict: Predicts a configuration for a GPU; raises UserError where it cannot.

    Attributes:
        unfit_by_bytes: After the last, if nothing fits: what the best that was tried lacks.
    """

    def __init__(self, run: Run, report: OutOfMemoryReport, predict: Predict) -> None:
        self._run, self._report, self._config, self._predict = run, report, run.config, predict
        self._gpu = gpu_with_room(run.environment, report)
        self._room = self._gpu.memory_bytes
        self._beyond_bytes = 0
        self._known: dict[str, Prediction | None] = {}
        self._best: tuple[int, Settings] | None = None
        self.unfit_by_bytes: int | None = None

    def __iter__(self) -> Iterator[Fix]:
        """Fixes, those that keep the mathematics first.

        Raises:
            UserError: The run as it is cannot be predicted, and so no change of it.
        """
        if self._report.verdict is Verdict.GROWN:  # whatever is gained, what leaks will take
            return
        if self._config.architecture is None and not self._config.pretrained:
            raise UserError("the architecture of the model is not known: it is none of transformers'")
        config = _shortest(self._config)
        self._known[techniques.memory_key(config)] = now = self._predict(config, self._gpu)
        self._beyond_bytes = beyond_prediction(self._run, self._report, now)
        gaps = self._report.verdict is Verdict.FRAGMENTED and not self._report.expandable_segments
        if gaps and self._fits(EXPANDABLE):
            yield self._fix(EXPANDABLE)
        # The run has died of it: what no prediction knows takes at least so much.
        self._beyond_bytes += max(0, self._room + 1 - self._needs(now))
        self._gpu = replace(self._gpu, context_bytes=self._beyond_bytes)
        found = False
        for effect in (Effect.NONE, Effect.NUMERICS, Effect.TRAINING):
            alone = False
            for ladder in self._ladders(now, effect):
                least = self._least(ladder) if self._could_suffice(now, ladder.name) else None
                if least is not None:
                    alone = True
                    yield self._fix(least)
            together = self._together(now, effect) if not (alone or found) else None
            if together is not None:
                yield self._fix(together)
            found = found or alone or together is not None
        if not found:
            needs, settings = self._best or (self._needs(now), {})
            self.unfit_by_bytes = needs - self._room
            if settings:
                yield self._fix(settings, fits=False)

    # --- what a change needs ------------------------------------------------------------

    def _needs(self, prediction: Prediction) -> int:
        """Bytes that a run needs, as far as is known; with gaps between blocks in the way, more than there are."""
        needs = prediction.safe_bound_bytes + self._beyond_bytes
        return max(self._room + 1, needs) if prediction.verdict is Outcome.FRAGMENTED else needs

    def _predicted(self, settings: Settings) -> Prediction | None:
        """Prediction of a change; None: it cannot be run."""
        config = _shortest(self._config.with_(settings))
        key = techniques.memory_key(config)
        if key not in self._known:
            try:
                techniques.check(config, self._run.environment)
                self._known[key] = prediction = self._predict(config, self._gpu)
            except UserError:
                self._known[key] = None
            else:
                needs = self._needs(prediction)
                if self._best is None or needs < self._best[0]:
                    self._best = needs, settings
        return self._known[key]

    def _fits(self, settings: Settings) -> bool:
        prediction = self._predicted(settings)
        return prediction is not None and self._needs(prediction) <= self._room

    # --- one option ---------------------------------------------------------------------

    def _ladders(self, now: Prediction, effect: Effect) -> list[Ladder]:
        """Ladders of changes with exactly this effect, what slows a step least first."""
        found = []
        for technique in techniques.registry().values():
            if technique.name != "parallel" and could_help(now, technique):
                found += ladders_of(technique, self._config)
        if effect is Effect.TRAINING:
            found += [_shorter(self._config, name) for name in OF_WORKLOAD]
            found.append(_more_shards(self._config))
        return sorted((one for one in found if one.effect is effect and one.rungs), key=lambda one: one.slowdown)

    def _could_suffice(self, now: Prediction, name: str) -> bool:
        """True if it would fit without all that an option acts on, and so may with some of it."""
        technique = techniques.registry().get(name)
        if technique is None:
            return True
        gone = {category.key for category in (*technique.acts_on, Category.TEMPORARIES, Category.RECOMPUTED)}
        rest = (sum(size for key, size in moment.items() if key not in gone) for moment in now.by_phase.values())
        return max(rest, default=0) + self._beyond_bytes <= self._room

    def _least(self, ladder: Ladder, beside: Settings | None = None) -> Settings | None:
        """The least change of an option that fits; None: none of its does.

        Args:
            ladder: The option.
            beside: What else is changed.
        """
        rungs = [{**(beside or {}), **rung} for rung in ladder.rungs]
        if not ladder.ordered:
            fitting = [rung for rung in rungs if self._fits(rung)]
            return max(fitting, key=self._peak_bytes, default=None)

        def needs(n: int) -> int:
            prediction = self._predicted(rungs[n - 1])
            return self._needs(prediction) if prediction is not None else self._room + 1

        found = largest(needs, (len(rungs) + 1) // 2, self._room, len(rungs))
        return rungs[found - 1] if found else None

    def _peak_bytes(self, settings: Settings) -> int:
        prediction = self._predicted(settings)
        assert prediction is not None
        return prediction.peak_bytes

    # --- several ------------------------------------------------------------------------

    def _together(self, now: Prediction, most: Effect) -> Settings | None:
        """Changes of several options that fit together, as few and as small as will do; None: none were found.

        The strongest of each option is taken until it fits; then each is taken back as far as it can be.
        """
        ladders = [one for effect in Effect if effect <= most for one in self._ladders(now, effect)]
        strongest = {one.name: strong for one in ladders if (strong := self._strongest(one, now)) is not None}
        by_saving = sorted(
            (one for one in ladders if one.name in strongest),
            key=lambda one: (one.effect, self._peak_bytes(strongest[one.name])),
        )
        chosen: dict[str, Settings] = {}
        by_name, best = {one.name: one for one in ladders}, self._needs(now)
        for ladder in by_saving:
            settings, taken = strongest[ladder.name], _merged(chosen)
            if ladder.name in chosen or settings.keys() & taken.keys():
                continue
            prediction = self._predicted({**taken, **settings})
            if prediction is None or self._needs(prediction) > best - LEAST_SAVING_BYTES:
                continue
            chosen[ladder.name], best = settings, self._needs(prediction)
            if best <= self._room:
                break
        else:
            return None
        for name in sorted(chosen, key=lambda name: -by_name[name].slowdown):
            beside = _merged({other: settings for other, settings in chosen.items() if other != name})
            if self._fits(beside):
                del chosen[name]
            elif (least := self._least(by_name[name], beside)) is not None:
                chosen[name] = {option: value for option, value in least.items() if option not in beside}
        return _merged(chosen)

    def _strongest(self, ladder: Ladder, now: Prediction) -> Settings | None:
        """The rung of a ladder that saves most; None: nothing of it lowers any phase."""
        rungs = ladder.rungs[:1] if ladder.ordered else ladder.rungs
        helping = [rung for rung in rungs if (found := self._predicted(rung)) and _lowers(found, now)]
        return min(helping, key=self._peak_bytes, default=None)

    # --- what is told -------------------------------------------------------------------

    def _fix(self, settings: Settings, fits: bool = True) -> Fix:
        changed = {name: value for name, value in settings.items() if value != self._config[name]}
        effect = techniques.effect(self._config, self._config.with_(changed))
        watched = self._run.kind is RunKind.WATCHED
        return Fix(
            set=changed,
            peak_bytes=max(0, self._peak_bytes(settings) + self._beyond_bytes),
            fits=fits,
            keeps_mathematics=effect is Effect.NONE,
            text=in_script(changed, self._config) if watched else costs(changed),
        )


def _shortest(config: RunConfig) -> RunConfig:
    """A run that needs the same: all micro-batches after the first run beside what it has left."""
    return config.with_({"accumulation": min(config.integer("accumulation"), 2)})


def _lowers(prediction: Prediction, now: Prediction) -> bool:
    """True if the highest moment of any phase is lower."""
    before = {phase: sum(moment.values()) for phase, moment in now.by_phase.items()}
    after = {phase: sum(moment.values()) for phase, moment in prediction.by_phase.items()}
    return any(after.get(phase, 0) <= size - LEAST_SAVING_BYTES for phase, size in before.items())


def beyond_prediction(run: Run, report: OutOfMemoryReport, prediction: Prediction) -> int:
    """Bytes that a run held beyond what is predicted of it, phase by phase, up to the moment it died.

    On a CPU it may have held less: the libraries' workspaces that a GPU has are predicted as well.

    Args:
        run: With the traces that were kept of it.
        report: Of the moment it died.
        prediction: Of the run as it is.
    """
    predicted = {trace.step: _highest(trace) for trace in prediction.run.traces()}
    steady = max(predicted, default=0)  # every step from there on is as this one
    differences = []
    for trace in run.traces():
        if trace.is_open:
            continue
        expected = predicted.get(min(trace.step, steady), {})
        differences += [size - expected[span] for span, size in _highest(trace).items() if span in expected]
    beyond = max(differences, default=0)
    if run.environment.on_gpu:
        beyond = max(beyond, 0)
    died_in = next((phase for phase in Phase if phase.title == report.phase), None)
    last = predicted.get(min(report.step, steady), {})
    if died_in is not None and (expected_bytes := last.get((died_in, min(report.micro_batch, 1)))) is not None:
        beyond = max(beyond, report.allocated_bytes + report.asked_bytes - expected_bytes)
    return beyond


def _highest(trace: StepTrace) -> dict[tuple[Phase, int], int]:
    """The most allocated in each phase that went through, of the first micro-batch and of those after it."""
    held = trace.held_bytes
    over = [span for span in trace.phases if trace.is_complete or span.end < len(trace.events)]
    found: dict[tuple[Phase, int], int] = {}
    for span in over:
        if span.phase is not Phase.RECOMPUTE:
            key = (span.phase, min(span.micro_batch, 1))  # later ones are as the second
            # While weights come, more may be held than ever again; what counts is what is there when they have.
            begin = span.end if span.phase is Phase.LOAD else span.begin
            found[key] = max(found.get(key, 0), int(held[begin : span.end + 1].max()))
    return found


def ladders_of(technique: Technique, config: RunConfig) -> list[Ladder]:
    """Ladders of a technique that can lower memory, one an effect on what is computed.

    Accumulation is at the same effective batch.
    """
    if technique.name == "accumulation":
        return [Ladder(technique.name, Effect.NONE, _smaller_micro_batches(config), True, technique.slowdown)]
    by_effect: dict[Effect, list[Settings]] = {}
    for value in technique.savers(config):
        settings = {technique.name: value}
        by_effect.setdefault(techniques.effect(config, config.with_(settings)), []).append(settings)
    return [
        Ladder(technique.name, effect, tuple(rungs), False, technique.slowdown)
        for effect, rungs in by_effect.items()
        if effect is not Effect.UNSOUND
    ]


def _smaller_micro_batches(config: RunConfig) -> tuple[Settings, ...]:
    """All ways to have the same rows a step in smaller micro-batches, the smallest first."""
    batch, parts = config.batch_size, config.integer("accumulation")
    sizes = (size for size in range(1, batch) if batch % size == 0)
    return tuple({"accumulation": parts * batch // size, "batch_size": size} for size in sizes)


def _shorter(config: RunConfig, name: str) -> Ladder:
    """Fewer rows, or fewer tokens in each: in steps as large as make a number that is easy to write."""
    now = config.integer(name)
    step = 1 << max(0, now.bit_length() - (7 if name == "batch_size" else 5))
    values: Sequence[int] = range(step, now, step)
    return Ladder(name, Effect.TRAINING, tuple({name: value} for value in values), ordered=True)


def _more_shards(config: RunConfig) -> Ladder:
    """The same job on more GPUs, where they hold the model between them."""
    now = config.integer("parallel.ranks") if config.text("parallel") not in ("none", "ddp") else 0
    rungs = tuple({"parallel.ranks": now * times} for times in (8, 4, 2) if now)
    return Ladder("parallel.ranks", Effect.TRAINING, rungs, ordered=True, slowdown=1.0)


def _merged(chosen: Mapping[str, Settings]) -> dict[str, Value]:
    return {option: value for settings in chosen.values() for option, value in settings.items()}


def settings_text(settings: Settings) -> str:
    """Settings as `--set` takes them."""
    return " ".join(f"{name}={show(value)}" for name, value in settings.items())


def costs(settings: Settings) -> str:
    """Costs of changes, in words; empty: they cost nothing to speak of."""
    words = techniques.costs(settings)
    if not {"accumulation", "batch_size"} <= settings.keys():
        words += [cost for name, cost in COST_OF_WORKLOAD.items() if name in settings]
    return "; ".join(words)


def in_script(settings: Settings, config: RunConfig) -> str:
    """Lines that change a configuration's settings in a script of one's own."""
    words, changed = [], config.with_(settings)
    for name, value in settings.items():
        how = script_lines(name, changed)
        words.append(f"{name}={show(value)} ({how})" if how else f"{name}={show(value)}")
    return ", ".join(words)
