"""Other people's kinds of training loops, each watched: what else they hold has an owner.

Every function trains for some steps on a device, tiny or at a real size.
"""

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, ResNetConfig, ResNetForImageClassification

from gpumem_tui.watch import MemoryCallback, watch


def language_model(device: str, big: bool) -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    hidden, layers = (1024, 12) if big else (64, 2)
    config = GPTNeoXConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=4 * hidden,
        vocab_size=32_000 if big else 128, max_position_embeddings=512, bos_token_id=0, eos_token_id=0,
        use_cache=False,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config).to(device)


def token_ids(device: str, big: bool) -> torch.Tensor:
    return torch.randint(0, 128, (8, 512) if big else (2, 16), device=device)


def log_probability(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    scores = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    chosen: torch.Tensor = scores.gather(-1, ids[:, 1:, None]).sum((1, 2))
    return chosen


def preferences(steps: int, device: str, big: bool) -> None:
    """Direct preference optimization (Rafailov et al. 2023): a frozen reference model beside the trained one."""
    model = language_model(device, big)
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
    with watch(model, optimizer):
        for _ in range(steps):
            chosen, rejected = token_ids(device, big), token_ids(device, big)
            margin = log_probability(model, chosen) - log_probability(model, rejected)
            with torch.no_grad():
                margin -= log_probability(reference, chosen) - log_probability(reference, rejected)
            loss = -functional.logsigmoid(0.1 * margin).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            del chosen, rejected, margin, loss


def average(steps: int, device: str, big: bool) -> None:
    """An exponential moving average of the weights, with loss scaling and clipping."""
    model = language_model(device, big)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
    )
    scaler = torch.amp.GradScaler(device, init_scale=1.0)
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    with watch(model, optimizer):
        for _ in range(steps):
            ids = token_ids(device, big)
            with torch.autocast(device, dtype):
                loss = model(input_ids=ids, labels=ids).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            averaged.update_parameters(model)
            optimizer.zero_grad()
            del ids, loss


def images(steps: int, device: str, big: bool) -> None:
    """ResNet-50 (He et al. 2015) under autocast: rows that are no tokens."""
    torch.manual_seed(0)
    config = ResNetConfig(num_labels=1000)
    if not big:
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=10)
    model = ResNetForImageClassification(config).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with watch(model, optimizer):
        for _ in range(steps):
            side = 224 if big else 32
            pixels = torch.randn(32 if big else 4, 3, side, side, device=device)
            labels = torch.randint(0, config.num_labels, (len(pixels),), device=device)
            with torch.autocast(device, torch.bfloat16):
                loss = model(pixel_values=pixels, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            del pixels, labels, loss


def optimizer_in_backward(steps: int, device: str, big: bool) -> None:
    """One optimizer a parameter, stepped as soon as its gradient is there."""
    model = language_model(device, big)
    optimizers = {parameter: torch.optim.AdamW([parameter], 1e-5) for parameter in model.parameters()}

    def step(parameter: torch.Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    with watch(model, optimizers):
        for _ in range(steps):
            ids = token_ids(device, big)
            model(input_ids=ids, labels=ids).loss.backward()
            del ids


def activations_on_the_host(steps: int, device: str, big: bool) -> None:
    """`save_on_cpu`: what backward needs is copied to the host and back."""
    model = language_model(device, big)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
    with watch(model, optimizer):
        for _ in range(steps):
            ids = token_ids(device, big)
            with torch.autograd.graph.save_on_cpu(pin_memory=device == "cuda"):
                model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            del ids


def compiled(steps: int, device: str, big: bool) -> None:
    """`torch.compile`: whole regions of the model are one operation."""
    model = language_model(device, big)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
    call: Any = torch.compile(model, backend="inductor" if device == "cuda" else "aot_eager")
    with watch(model, optimizer):
        for _ in range(steps):
            ids = token_ids(device, big)
            call(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            del ids


def supervised(steps: int, device: str, big: bool) -> None:
    """TRL's SFTTrainer. Raises ImportError where it is not installed."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from .sft_trainer import tokenizer

    model = language_model(device, big)
    rows = Dataset.from_dict({"input_ids": token_ids("cpu", big).repeat(8, 1).tolist()})
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder, max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[],
            use_cpu=device == "cpu", disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False,
            bf16=device == "cuda",
        )  # fmt: skip
        SFTTrainer(
            model, arguments, train_dataset=rows, processing_class=tokenizer(), callbacks=[MemoryCallback()]
        ).train()


LOOPS: list[Callable[[int, str, bool], None]] = [
    preferences, average, images, optimizer_in_backward, activations_on_the_host, compiled, supervised,
]  # fmt: skip
