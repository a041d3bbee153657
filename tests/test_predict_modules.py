"""Any PyTorch module: somebody's own functions, run as they are over fake tensors, become a Run like any other."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gpumem_tui.engine.config import UserError
from gpumem_tui.engine.prediction.any_module import MOVED
from gpumem_tui.engine.prediction.convolutions import TILE_BYTES
from gpumem_tui.engine.prediction.public import Prediction, Training, predict
from gpumem_tui.engine.recording import Recording
from gpumem_tui.engine.watch.watcher import watch
from gpumem_tui.tui.cli import main

from .examples import predicted as examples

WIDTH, ROWS = 256, 64
MATRIX_BYTES = WIDTH * WIDTH * 4


def linear() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH, bias=False)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1)


def rows() -> Tensor:
    return torch.randn(ROWS, WIDTH)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_what_a_module_holds_is_what_arithmetic_says() -> None:
    found = predict(linear, lambda model: torch.optim.Adam(model.parameters()), rows, step, gpu="A100 80GB", steps=2)
    assert found.by_category["parameters"] == MATRIX_BYTES
    after = found.document.after_first_step
    assert after is not None
    assert after.by_category["optimizer_state"] == pytest.approx(2 * MATRIX_BYTES, abs=1024)
    assert after.by_category["gradients"] == MATRIX_BYTES
    assert after.by_category["inputs"] == ROWS * WIDTH * 4
    assert (found.document.unknown_bytes_max, found.document.mismatch_bytes_max) == (0, 0)
    assert found.peak_bytes <= found.safe_bound_bytes < found.available_bytes


def test_cuda_is_the_gpu_predicted_for_and_the_host_stays_the_host() -> None:
    seen: list[Any] = []

    def model() -> nn.Module:
        seen.append((torch.cuda.is_available(), torch.cuda.get_device_name(), torch.cuda.get_device_capability()))
        return linear().to("cuda" if torch.cuda.is_available() else "cpu")

    def half_moved(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        with torch.autocast("cuda"):
            out = model(x.pin_memory().cuda(non_blocking=True))
        seen.append(out.dtype)
        out.float().mean().backward()
        optimizer.step()

    found = predict(model, sgd, rows, half_moved, gpu="T4")
    assert seen[0] == (True, "T4 16GB", (7, 5))
    assert seen[-1] == torch.float16
    assert found.by_category["inputs"] + found.by_category["held_by_script"] <= ROWS * WIDTH * 4
    assert not torch.cuda.is_available() or torch.cuda.get_device_name() != "T4 16GB"


def test_it_can_be_printed_saved_opened_and_exported(tmp_path: Path) -> None:
    found = predict(linear, sgd, rows, step, name="mine")
    assert str(found).startswith("mine on H100 80GB, predicted\n")
    found.save(tmp_path / "mine.gpumem")
    (run,) = Recording(tmp_path / "mine.gpumem").runs()
    assert [trace.step for trace in run.traces()] == [0, 1, 2, 3]
    found.export(tmp_path / "mine.csv", "csv")
    assert (tmp_path / "mine.csv").stat().st_size > 0
    assert Prediction.unpacked(found.packed(), found.config).peak_bytes == found.peak_bytes


@pytest.mark.parametrize(
    "decide",
    [
        lambda loss: loss.item() > 1.0,
        lambda loss: bool(loss > 1.0),
        lambda loss: 2 * float(loss) + loss.item() == 0,
    ],
    ids=["item", "bool", "computed with"],
)
def test_what_decides_by_data_is_said_with_its_place(decide: Callable[[Tensor], Any]) -> None:
    def deciding(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        loss = model(x).mean()
        decide(loss)
        loss.backward()
        optimizer.step()

    _, note = predict(linear, sgd, rows, deciding).notes
    assert note.startswith(f"tests/test_predict_modules.py:{decide.__code__.co_firstlineno}: ")
    assert note.endswith(".")


def test_a_number_that_is_only_logged_is_not_worth_a_word() -> None:
    logged: list[str] = []

    def logging(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        loss = model(x).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        logged.append(f"{loss.item() / 2:.3f}")

    notes = predict(linear, sgd, rows, logging).notes
    assert notes == (f"tests/test_predict_modules.py:{linear.__code__.co_firstlineno}: {MOVED}.",)
    assert logged == ["0.000"] * 2


class Foreign(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() * 2)


@torch.library.custom_op("tests_predict::unknown", mutates_args=())
def unknown(x: Tensor) -> Tensor:
    return x.clone()


def without_cudnn(x: Tensor) -> Any:
    with torch.backends.cudnn.flags(enabled=False):
        return nn.LSTM(WIDTH, 8).to(x.device)(x)


def autocast_cell(x: Tensor) -> Tensor:
    with torch.autocast("cuda"):
        found: Tensor = nn.GRUCell(WIDTH, 8)(x)
    return found


@pytest.mark.parametrize(
    ("why", "compute"),
    [
        ("depends on data", torch.unique),
        ("depends on data", lambda x: x[x > 0]),
        ("no fake kernel", unknown),
        ("of which there is none here", Foreign.apply),
        ("what lstm holds without cuDNN is not known here", without_cudnn),
        ("what autocast keeps of gru_cell is not known here", autocast_cell),
        ("ZeroDivisionError", lambda x: x / (1 // 0)),
    ],
)
def test_what_cannot_be_faked_is_refused_with_its_place(why: str, compute: Callable[[Tensor], Any]) -> None:
    def impossible(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        compute(model(x))

    with pytest.raises(UserError, match=why) as refused:
        predict(linear, sgd, rows, impossible)
    assert str(refused.value).startswith("tests/test_predict_modules.py:")


class Unrolled(nn.Module):
    """A recurrent cell over a sequence, its outputs stacked."""

    def __init__(self, cell: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.cell = cell(WIDTH, WIDTH)

    def forward(self, xs: Tensor) -> Tensor:
        state, outputs = self.cell(xs[0]), []
        for x in xs[1:]:
            state = self.cell(x, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs)


@pytest.mark.parametrize(("cell", "widths"), [(nn.LSTMCell, 3 * 4 + 2), (nn.GRUCell, 2 * 3 + 5 + 1)])
def test_a_recurrent_cell_keeps_for_backward_what_cudas_kernel_does(cell: Any, widths: int) -> None:
    """The gates' two products, a workspace and the new state, of each step."""

    def held(length: int) -> int:
        def sequence() -> Tensor:
            return torch.randn(length, ROWS, WIDTH, device="cuda")

        return predict(lambda: Unrolled(cell).cuda(), sgd, sequence, step).by_category["activations"]

    assert held(20) - held(16) == 4 * widths * ROWS * WIDTH * 4


def test_a_recurrent_cell_on_the_host_is_the_hosts() -> None:
    host = nn.LSTMCell(WIDTH, WIDTH)
    step_of_it = predict(linear, sgd, rows, lambda m, o, x: (host(torch.zeros(2, WIDTH)), step(m, o, x)))
    assert step_of_it.peak_bytes == predict(linear, sgd, rows, step).peak_bytes


def asserting(*_: Any) -> Any:
    raise AssertionError


def test_an_error_that_says_nothing_is_called_by_its_class_once() -> None:
    with pytest.raises(UserError) as refused:
        predict(linear, sgd, rows, asserting)
    place = f"tests/test_predict_modules.py:{asserting.__code__.co_firstlineno + 1}"
    assert str(refused.value) == f"{place}: AssertionError"


def test_an_error_in_no_line_of_the_script_is_the_trainings() -> None:
    with pytest.raises(UserError, match=r"^the training: TypeError: "):
        predict(partial(nn.Linear, WIDTH), sgd, rows, step)


def test_a_loss_is_scaled() -> None:
    scalers: list[torch.amp.GradScaler] = []

    def with_scaler(model: nn.Module) -> torch.optim.Optimizer:
        scalers.append(torch.amp.GradScaler("cuda"))
        return sgd(model)

    def scaled(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        (scaler,) = scalers
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    assert predict(linear, with_scaler, rows, scaled).config["loss_scaling"]


def test_a_step_that_trains_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"without optimizer\.step"):
        predict(linear, sgd, rows, lambda model, _optimizer, x: model(x))


def test_inference_needs_no_optimizer() -> None:
    def use(model: nn.Module, _optimizer: None, x: Tensor) -> None:
        with torch.no_grad():
            model(x)

    found = predict(linear, lambda _: None, rows, use)
    assert found.by_category["gradients"] == found.by_category["optimizer_state"] == 0
    assert len(found.document.steps) == 3


@pytest.mark.parametrize(
    "training",
    [
        examples.plain_loop(2, 16, 32, 2),
        examples.resnet50(2, 64, mixed=True),
        examples.unet(1, 16, 32),
        examples.own_module(2, 32, 32, 2),
        examples.recurrent_cells(2, 4, 32),
        examples.lstm_language_model(2, 4, 32),
        examples.gru_encoder(2, 4, 32),
    ],
    ids=["plain loop", "ResNet-50", "U-Net", "own module", "recurrent cells", "LSTM", "GRU"],
)
def test_the_examples_are_predicted(training: Training) -> None:
    found = predict(*training)
    assert found.document.unknown_bytes_max == found.document.mismatch_bytes_max == 0
    assert found.by_phase["forward"]["activations"] > 0
    assert found.notes == ()


def convolved(gpu: str = "H100 80GB", format: torch.memory_format = torch.contiguous_format) -> Prediction:
    """A step of one large convolution: the peak is where it runs."""

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        model(x).sum().backward()
        optimizer.step()

    def batch() -> Tensor:
        return torch.randn(8, 4, 128, 128, device="cuda").contiguous(memory_format=format)

    return predict(lambda: nn.Conv2d(4, 4, 3, padding=1).cuda(), sgd, batch, step, gpu=gpu)


def test_convolutions_on_tensor_cores_copy_images_to_have_their_channels_last() -> None:
    """A GPU without tensor cores for float32, or images that have their channels last already: no copies."""
    image, weight = 8 * 4 * 128 * 128 * 4, 4 * 4 * 3 * 3 * 4
    assert convolved().by_phase["forward"]["temporaries"] == 2 * image + weight
    for found in (convolved("T4"), convolved(format=torch.channels_last)):
        assert found.by_phase["forward"].get("temporaries", 0) == 0


def test_parts_of_a_convolution_that_are_added_up_are_in_the_bound_alone() -> None:
    """Nobody knows into how many parts cuDNN cuts it: each multiprocessor may have one."""
    found = convolved()
    assert 0 < found.unsure_bytes <= 132 * TILE_BYTES
    assert found.safe_bound_bytes >= found.peak_bytes + found.unsure_bytes
    assert "cuDNN" in str(found)


def test_a_script_is_predicted_from_the_shell(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text(
        "import torch\nfrom gpumem_tui.engine.prediction.public import Training\n"
        "def training():\n"
        "    def step(model, optimizer, x):\n"
        "        model(x).mean().backward()\n"
        "        optimizer.step()\n"
        "    return Training(lambda: torch.nn.Linear(64, 64), lambda m: torch.optim.SGD(m.parameters(), 1.0),\n"
        "                    lambda: torch.randn(8, 64), step)\n"
        "def nothing(): return 1\n"
        "def broken(): return 1 / 0\n"
    )
    assert main(["estimate", "--script", f"{script}:training", "--gpu", "24GB", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["peak"]["by_category"]["parameters"] == 64 * 65 * 4
    for function, said in (("nothing", "Training"), ("broken", "mine.py:10: ZeroDivisionError"), ("none", "'none'")):
        assert main(["estimate", "--script", f"{script}:{function}"]) == 2
        assert said in capsys.readouterr().err
    assert main(["estimate", "--script", str(script)]) == 2
    assert f"say which of its functions returns the training: {script}:FUNCTION" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name",
    ["plain_loop", "resnet50", "unet", "own_module", "recurrent_cells", "lstm_language_model", "gru_encoder"],
)
def test_measured_on_a_gpu_it_is_under_the_bound(name: str) -> None:
    from gpumem_tui.engine.prediction.gpu_here import gpu_here

    training: Training = getattr(examples, name)()
    card = gpu_here()
    assert card is not None
    found = predict(*training, gpu=card)
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # each thread's that has used cuBLAS in this process
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = training.model()
    optimizer = training.optimizer(model)
    with watch(model, optimizer):
        for _ in range(3):
            training.step(model, optimizer, training.batch())
    measured = torch.cuda.max_memory_allocated()
    assert measured <= found.safe_bound_bytes
    assert found.peak_bytes == pytest.approx(measured, rel=0.01)


def test_the_loss_of_the_last_step_is_still_held() -> None:
    """What a loop's variables hold when the next batch comes is there, as in a real one."""
    kept: list[Tensor] = []

    def keeping(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        out = model(x)
        functional.mse_loss(out, x).backward()
        optimizer.step()
        kept.append(out.detach())

    first, second = (step_.allocated_bytes for step_ in predict(linear, sgd, rows, keeping).document.steps[1:])
    assert first is not None and second is not None
    assert second - first == ROWS * WIDTH * 4
