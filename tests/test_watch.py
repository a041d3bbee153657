"""Any training script, watched exactly: every byte has an owner, and sums are the allocator's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.events import Phase
from gpumem_tui.engine.run_events import Recomputed, Refused, RunStarted, StepEnded
from gpumem_tui.engine.tracing import owners
from gpumem_tui.engine.watch import loop
from gpumem_tui.engine.watch.leftovers import SCRIPT
from gpumem_tui.engine.watch.watched_source import WatchedSource
from gpumem_tui.watch import watch

from .examples import accelerate_loop, plain_loop, strangers, trainer_lora
from .watching import Seen, check_exact, small_model, train

# transformers and PEFT still use names that newer transformers call deprecated.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore::FutureWarning:(transformers|peft|accelerate)\..*"),
    pytest.mark.usefixtures("frozen_heap", "runtime_folder"),
]


def test_a_plain_loop(seen: Seen) -> None:
    losses = plain_loop.main(4)
    check_exact(seen)
    assert [started.watched for started in seen.told(RunStarted)] == [True]
    told = [m.step for m in seen.told(StepEnded)]
    assert told == [1, 2, 3, 4] and len(losses) == 4
    ledger = seen.ledgers[-1]
    after = ledger.after(Phase.OPTIMIZER)
    assert after is not None
    assert after[Category.GRADIENTS] == after[Category.PARAMETERS] > 0
    assert 2 * after[Category.PARAMETERS] <= after[Category.OPTIMIZER_STATE] < 2.1 * after[Category.PARAMETERS]
    assert ledger.peak.by_category[Category.ACTIVATIONS] > 0
    phases = [span.phase for span in ledger.trace.phases]
    assert phases == [Phase.DATA, Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER]
    assert any(layer.startswith("1") for layer in ledger.by_layer(ledger.peak.event))


def test_a_trainer_with_lora_and_checkpointing(seen: Seen) -> None:
    model = trainer_lora.main(3)
    check_exact(seen, script_bytes_max=4096)  # the loader has the next batch at hand
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    after = seen.ledgers[-1].after(Phase.OPTIMIZER)
    assert after is not None and after[Category.GRADIENTS] == trained
    config = seen.sources[-1].run.config
    assert config is not None
    assert (config["lora"], config["checkpointing"], config["batch_size"]) == (True, "layers", 4)
    recomputed = [m.layers for m in seen.told(Recomputed)]
    assert len(recomputed) == 2 * 3
    assert all(layers[0].endswith(("layers.0", "layers.1")) for layers in recomputed)


def test_an_accelerate_loop_with_accumulation(seen: Seen) -> None:
    accelerate_loop.main(3)
    check_exact(seen, script_bytes_max=4096)  # the data set, and the batch at hand
    assert [trace.micro_batches for trace in seen.traces] == [2, 2, 2]
    assert {span.micro_batch for span in seen.traces[-1].phases} == {0, 1}


def test_what_the_script_keeps_is_said_to_be_the_scripts(seen: Seen) -> None:
    model, optimizer = small_model()
    with watch(model, optimizer):
        kept = [torch.ones(1000)]
        train(model, optimizer, 1)
        kept.append(torch.ones(1000))
        train(model, optimizer, 1)
    last = seen.ledgers[-1]
    assert last.by_name(len(last.trace.events) - 1, Category.HELD_BY_SCRIPT) == {SCRIPT: sum(t.nbytes for t in kept)}


def test_other_models_and_optimizers_are_told_apart_by_name(seen: Seen) -> None:
    """A frozen teacher, an average made after two steps, a discriminator with an optimizer of its own."""
    model, optimizer = small_model()
    teacher, critic = small_model()[0].requires_grad_(False), torch.nn.Linear(16, 1)
    holder = Holder()
    holder.teacher, holder.critic = teacher, critic
    critic_optimizer = torch.optim.Adam(critic.parameters())
    with watch(model, optimizer):
        train(model, optimizer, 2)
        holder.average = average = torch.optim.swa_utils.AveragedModel(model)
        for _ in range(3):
            critic(torch.ones(2, 16)).sum().backward()
            critic_optimizer.step()
            train(model, optimizer, 1)
            average.update_parameters(model)
    ledger = seen.ledgers[-1]
    parameters, state, gradients = (
        ledger.by_name(len(ledger.trace.events) - 1, category)
        for category in (Category.PARAMETERS, Category.OPTIMIZER_STATE, Category.GRADIENTS)
    )
    for other in (teacher, average.module):
        owner = "teacher" if other is teacher else "average"
        for name, parameter in other.named_parameters():
            assert parameters[f"{owner}: {name}"] == parameters[name] == parameter.nbytes
    assert state["critic: weight.exp_avg"] == gradients["critic: weight"] == critic.weight.nbytes
    assert ledger.by_layer(-1)["teacher"][Category.PARAMETERS] == sum(p.nbytes for p in teacher.parameters())
    assert sum(ledger.by_name(-1, Category.HELD_BY_SCRIPT).values()) <= 64
    assert ledger.curve[Category.UNKNOWN].max() == 0


class Holder:
    teacher: torch.nn.Module
    critic: torch.nn.Module
    average: torch.nn.Module


def test_an_optimizer_in_backward(seen: Seen) -> None:
    """One optimizer a parameter, stepped as soon as its gradient is there: the step ends with backward."""
    model, _ = small_model()
    optimizers = {p: torch.optim.AdamW([p]) for p in model.parameters()}

    def step(parameter: torch.Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    with watch(model, optimizers):
        for _ in range(3):
            ids = torch.arange(32).view(2, 16)
            model(input_ids=ids, labels=ids).loss.backward()
    check_exact(seen)
    ledger = seen.ledgers[-1]
    held = sum(p.nbytes for p in model.parameters())
    after = ledger.after(Phase.OPTIMIZER)
    assert after is not None and after[Category.OPTIMIZER_STATE] > 2 * held and after[Category.GRADIENTS] == 0
    assert [m.step for m in seen.told(StepEnded)] == [1, 2, 3]


@pytest.mark.parametrize("loop", strangers.LOOPS, ids=lambda loop: loop.__name__)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_of_other_peoples_loops_everything_has_an_owner(loop: Callable[..., None], seen: Seen) -> None:
    try:
        loop(3, "cpu", False)
    except ImportError as error:
        pytest.skip(str(error))
    assert [trace.step for trace in seen.traces] == [1, 2, 3]
    assert not seen.told(Refused), "watching has not failed"
    for ledger in seen.ledgers:
        assert ledger.curve[Category.UNKNOWN].max() == 0
        assert ledger.mismatch_bytes == 0
    last = seen.ledgers[-1]
    assert last.curve[Category.HELD_BY_SCRIPT].max() <= 0.01 * last.peak.bytes, last.by_name(
        last.peak.event, Category.HELD_BY_SCRIPT
    )
    assert last.peak.by_category[Category.PARAMETERS] > 0


def test_batch_accumulation_and_loss_are_what_they_are(seen: Seen) -> None:
    """A model that divides its loss by the tokens of all micro-batches, and one that does not."""
    for shares in ({}, {"num_items_in_batch": torch.tensor(4 * 15)}):
        model, optimizer = small_model()
        losses = []
        with watch(model, optimizer):
            for _ in range(2):
                for _ in range(2):
                    ids = torch.arange(32).view(2, 16)
                    loss = model(input_ids=ids, labels=ids, **shares).loss
                    loss.backward()
                    losses.append(loss.item())
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                model(input_ids=ids, labels=ids)
        run = seen.sources[-1].run
        assert run is not None
        assert [run.config[name] for name in ("batch_size", "seq_len", "accumulation")] == [2, 16, 2]
        steps = seen.told(StepEnded)
        assert [(step.tokens, step.rows) for step in steps] == [(64, 4)] * 2
        expected = sum(losses[:2]) if shares else sum(losses[:2]) / 2
        assert steps[0].loss == pytest.approx(expected)
        assert run.config.architecture is not None and run.config.architecture.config["model_type"] == "gpt_neox"


def test_rows_that_are_no_tokens_are_rows(seen: Seen) -> None:
    strangers.images(2, "cpu", False)
    assert [(step.tokens, step.rows) for step in seen.told(StepEnded)] == [(None, 4)] * 2


def test_an_output_without_a_kv_cache_is_not_asked_for_one_by_its_old_name() -> None:
    """transformers warns of that, in the user's own output."""

    class Output(ImageClassifierOutputWithNoAttention):
        past_key_values = property(lambda self: pytest.fail("asked"))

    assert owners.cache_in(Output(logits=torch.zeros(1))) is None


def test_inference_is_watched_without_an_optimizer(seen: Seen, capsys: pytest.CaptureFixture[str]) -> None:
    """A step is a generation, with a KV cache that grows, or a forward pass."""
    model = small_model()[0].eval()
    model.config.use_cache = True
    with watch(model, name="used"):
        for _ in range(2):
            model.generate(torch.ones(1, 4, dtype=torch.int64), max_new_tokens=3, do_sample=False, pad_token_id=0)
        with torch.no_grad():
            model(input_ids=torch.ones(1, 4, dtype=torch.int64), use_cache=False)
    steps = seen.told(StepEnded)
    assert [step.tokens for step in steps] == [4 + 1 + 1, 4 + 1 + 1, 4]
    assert [step.loss for step in steps] == [None] * 3
    for ledger in seen.ledgers:
        assert ledger.curve[Category.UNKNOWN].max() == 0
        assert {span.phase for span in ledger.trace.phases} <= {Phase.DATA, Phase.FORWARD}
    assert seen.ledgers[0].curve[Category.KV_CACHE].max() > 0
    assert seen.ledgers[2].curve[Category.KV_CACHE].max() == 0
    assert "gpumem-tui: watching GPTNeoXForCausalLM; to see it: gpumem-tui attach used" in capsys.readouterr().err


def test_a_loop_that_never_steps_costs_no_more_the_longer_it_is(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its open step is published in parts, each traced anew."""
    monkeypatch.setattr(loop, "LONGEST_PART", 200)
    monkeypatch.setattr(loop, "LEAST_PASSES", 2)
    model, optimizer = small_model()
    parts: list[int] = []
    publish = WatchedSource.publish
    monkeypatch.setattr(WatchedSource, "publish", lambda s, t: (parts.append(len(t.marks)), publish(s, t)))
    with watch(model, optimizer):
        for _ in range(12):
            ids = torch.arange(32).view(2, 16)
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert len(parts) > 3 and max(parts) < 600
    (last,) = seen.ledgers
    assert last.mismatch_bytes == 0 and last.curve[Category.UNKNOWN].max() == 0
    assert seen.told(StepEnded)[0].peak_bytes >= last.peak.bytes  # type: ignore[operator]
