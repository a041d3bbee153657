"""Training loops in plain PyTorch, predicted as they are.

    gpumem-tui estimate --script tests/examples/predicted.py:resnet50 --gpu A100

Each function returns the functions of one training; nothing in them knows of a prediction.
"""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from gpumem_tui.predict import Training


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-4)


# --- a plain loop ------------------------------------------------------------------


def plain_loop(rows: int = 32, tokens: int = 256, width: int = 512, layers: int = 6) -> Training:
    """A small language model from PyTorch's own layers, with clipping."""

    def model() -> nn.Module:
        blocks = [nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.1, batch_first=True) for _ in range(layers)]
        return nn.Sequential(nn.Embedding(8192, width), *blocks, nn.Linear(width, 8192)).to("cuda")

    def batch() -> Tensor:
        return torch.randint(0, 8192, (rows, tokens), device="cuda")

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
        scores = model(ids)
        loss = functional.cross_entropy(scores.flatten(0, 1), ids.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Training(model, adam, batch, step)


# --- ResNet-50 (He et al. 2015), as torchvision builds it ------------------------------


class Bottleneck(nn.Module):
    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.conv1 = nn.Conv2d(inside, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inside != out:
            self.downsample = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


class ResNet50(nn.Sequential):
    def __init__(self) -> None:
        stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        stages, inside = [], 64
        for stage, count in enumerate((3, 4, 6, 3)):
            width = 64 << stage
            blocks = [
                Bottleneck(inside if n == 0 else 4 * width, width, 2 if n == 0 and stage else 1) for n in range(count)
            ]
            stages.append(nn.Sequential(*blocks))
            inside = 4 * width
        super().__init__(stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 1000))


def resnet50(rows: int = 64, size: int = 224, mixed: bool = False) -> Training:
    """Images from a data loader on the host, momentum, optionally autocast with loss scaling."""
    scalers: list[torch.amp.GradScaler] = []

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        scalers[:] = [torch.amp.GradScaler("cuda", enabled=mixed)]
        return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)

    def batch() -> tuple[Tensor, Tensor]:
        return torch.randn(rows, 3, size, size), torch.randint(0, 1000, (rows,))

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> float:
        (scaler,) = scalers
        images, labels = (part.to("cuda", non_blocking=True) for part in batch)
        optimizer.zero_grad()
        with torch.autocast("cuda", enabled=mixed):
            loss = functional.cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    return Training(lambda: ResNet50().cuda(), optimizer, batch, step)


# --- a U-Net of a diffusion model (Ho et al. 2020; Dhariwal and Nichol 2021) -------------


class ResidualBlock(nn.Module):
    def __init__(self, inside: int, out: int, time: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(32, inside), nn.SiLU(), nn.Conv2d(inside, out, 3, padding=1))
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(time, out))
        self.second = nn.Sequential(nn.GroupNorm(32, out), nn.SiLU(), nn.Conv2d(out, out, 3, padding=1))
        self.skip = nn.Conv2d(inside, out, 1) if inside != out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.second(self.first(x) + self.time(time)[:, :, None, None]) + self.skip(x)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = (
            nn.GroupNorm(32, width),
            nn.Conv2d(width, 3 * width, 1),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, wide = x.shape
        q, k, v = (
            self.qkv(self.norm(x))
            .view(batch, 3, self.heads, width // self.heads, height * wide)
            .transpose(-1, -2)
            .unbind(1)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(-1, -2).reshape(batch, width, height, wide))


class UNet(nn.Module):
    def __init__(self, base: int = 128, multiples: tuple[int, ...] = (1, 2, 2, 4), blocks: int = 2) -> None:
        super().__init__()
        self.base, time = base, 4 * base
        self.time = nn.Sequential(nn.Linear(base, time), nn.SiLU(), nn.Linear(time, time))
        self.enter = nn.Conv2d(3, base, 3, padding=1)
        widths, width = [base], base
        self.down = nn.ModuleList()
        for level, multiple in enumerate(multiples):
            for _ in range(blocks):
                attention = Attention(base * multiple) if level >= len(multiples) - 2 else nn.Identity()
                self.down.append(nn.ModuleList([ResidualBlock(width, base * multiple, time), attention]))
                width = base * multiple
                widths.append(width)
            if level < len(multiples) - 1:
                self.down.append(nn.ModuleList([nn.Conv2d(width, width, 3, 2, 1)]))
                widths.append(width)
        self.middle = nn.ModuleList(
            [ResidualBlock(width, width, time), Attention(width), ResidualBlock(width, width, time)]
        )
        self.up = nn.ModuleList()
        for level, multiple in reversed([*enumerate(multiples)]):
            for _ in range(blocks + 1):
                attention = Attention(base * multiple) if level >= len(multiples) - 2 else nn.Identity()
                self.up.append(nn.ModuleList([ResidualBlock(width + widths.pop(), base * multiple, time), attention]))
                width = base * multiple
            if level:
                self.up.append(nn.ModuleList([nn.Conv2d(width, width, 3, padding=1)]))
        self.leave = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        half = self.base // 2
        angles = steps[:, None] * torch.exp(torch.arange(half, device=x.device) * (-math.log(10_000) / half))
        time = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        x = self.enter(x)
        skips = [x]
        for parts in self.down:
            x = parts[1](parts[0](x, time)) if len(parts) == 2 else parts[0](x)
            skips.append(x)
        x = self.middle[2](self.middle[1](self.middle[0](x, time)), time)
        for parts in self.up:
            if len(parts) == 2:
                x = parts[1](parts[0](torch.cat([x, skips.pop()], 1), time))
            else:
                x = parts[0](functional.interpolate(x, scale_factor=2.0))
        return self.leave(x)


def unet(rows: int = 16, size: int = 64, base: int = 128) -> Training:
    """Noise is predicted, and an average of the weights kept beside the model."""
    averages: list[nn.Module] = []

    def model() -> nn.Module:
        made = UNet(base).cuda()
        averages[:] = [copy.deepcopy(made).requires_grad_(False)]
        return made

    def batch() -> Tensor:
        return torch.randn(rows, 3, size, size)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor) -> None:
        images = images.cuda()
        steps = torch.randint(0, 1000, (rows,), device="cuda")
        noise = torch.randn_like(images)
        kept = torch.cos(steps / 1000 * math.pi / 2)[:, None, None, None]
        loss = functional.mse_loss(model(kept * images + (1 - kept**2).sqrt() * noise, steps), noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_([*averages[0].parameters()], [*model.parameters()], 1e-3)

    return Training(model, adam, batch, step)


# --- a module of one's own ----------------------------------------------------------------


class Square(torch.autograd.Function):
    """Squared ReLU that keeps its input alone."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.relu().square_()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x.relu().mul_(grad).mul_(2)


class GatedMixer(nn.Module):
    """Tokens are mixed by a gated long convolution, as no library has it."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.norm, self.inside, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.filter = nn.Parameter(torch.randn(width, tokens) / tokens)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value, skip = self.inside(self.norm(x)).chunk(3, -1)
        length = x.shape[1]
        spectrum = torch.fft.rfft(value.transpose(1, 2), n=2 * length) * torch.fft.rfft(self.filter, n=2 * length)
        mixed = torch.fft.irfft(spectrum, n=2 * length)[..., :length].transpose(1, 2)
        x = x + self.out(mixed * torch.sigmoid(gate) + skip)
        return x + self.down(Square.apply(self.up(x)))


class Mixers(nn.Module):
    def __init__(self, width: int, tokens: int, layers: int, checkpointed: bool) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(GatedMixer(width, tokens) for _ in range(layers)), nn.Linear(width, 256)
        self.embedding, self.checkpointed = nn.Embedding(256, width), checkpointed

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x)


def own_module(
    rows: int = 16, tokens: int = 1024, width: int = 512, layers: int = 8, checkpointed: bool = True
) -> Training:
    """Bytes are predicted by a module that no library has; two micro-batches a step, each block checkpointed."""

    def batch() -> list[Tensor]:
        return [torch.randint(0, 256, (rows, tokens), device="cuda") for _ in range(2)]

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> None:
        for ids in batches:
            functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Training(lambda: Mixers(width, tokens, layers, checkpointed).cuda(), adam, batch, step)


# --- recurrent cells, step by step -----------------------------------------------------


class Cells(nn.Module):
    """A language model of an LSTM's cell under a GRU's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(8192, width), nn.Linear(width, 8192)
        self.lower, self.upper = nn.LSTMCell(width, width), nn.GRUCell(width, width)

    def forward(self, ids: Tensor) -> Tensor:
        lower = upper = None
        outputs = []
        for x in self.embedding(ids).unbind(1):
            lower = self.lower(x, lower)
            upper = self.upper(lower[0], upper)
            outputs.append(upper)
        return self.head(torch.stack(outputs, 1))


def recurrent_cells(rows: int = 64, tokens: int = 128, width: int = 512) -> Training:
    """A sequence goes through two cells one token after another; backward goes back through all of it."""

    def batch() -> Tensor:
        return torch.randint(0, 8192, (rows, tokens), device="cuda")

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
        functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Training(lambda: Cells(width).cuda(), adam, batch, step)


# --- whole recurrent layers ------------------------------------------------------------


class LanguageModel(nn.Module):
    """Words from those before them, by an LSTM, and dropout as in Zaremba et al. 2014."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(8192, width), nn.Linear(width, 8192)
        self.lstm = nn.LSTM(width, width, layers, dropout=0.5, batch_first=True)
        self.dropout = nn.Dropout(0.5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.dropout(self.lstm(self.dropout(self.embedding(ids)))[0]))


def lstm_language_model(rows: int = 64, tokens: int = 256, width: int = 650, mixed: bool = False) -> Training:
    """An LSTM of two layers; in mixed precision it is computed in float16."""

    def batch() -> Tensor:
        return torch.randint(0, 8192, (rows, tokens), device="cuda")

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
            scores = model(ids)
            loss = functional.cross_entropy(scores.flatten(0, 1), ids.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
        optimizer.zero_grad()

    return Training(lambda: LanguageModel(width, 2).cuda(), adam, batch, step)


class Encoder(nn.Module):
    """Classes of texts, by a GRU that reads them both ways."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(8192, width), nn.Linear(4 * width, 16)
        self.gru = nn.GRU(width, 2 * width, layers, dropout=0.2, bidirectional=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.gru(self.embedding(ids.T))[0].amax(0))


def gru_encoder(rows: int = 128, tokens: int = 400, width: int = 256) -> Training:
    """A bidirectional GRU of three layers."""

    def batch() -> tuple[Tensor, Tensor]:
        ids = torch.randint(0, 8192, (rows, tokens), device="cuda")
        return ids, torch.randint(0, 16, (rows,), device="cuda")

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> None:
        functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Training(lambda: Encoder(width, 3).cuda(), adam, batch, step)
