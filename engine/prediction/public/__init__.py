"""Any PyTorch module's memory before it is run: `from gpumem_tui.predict import predict`.

    def model():              return resnet50().cuda()
    def optimizer(model):     return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    def batch():              return torch.randn(64, 3, 224, 224), torch.randint(1000, (64,))

    def step(model, optimizer, batch):
        images, labels = (part.cuda() for part in batch)
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    print(predict(model, optimizer, batch, step, gpu="A100"))

No GPU is needed and nothing is computed. The packaging maps this folder to
`gpumem_tui.predict`; the code is in `gpumem_tui.engine.prediction`.
"""

from __future__ import annotations

from gpumem_tui.engine.prediction.any_module import Training, predict
from gpumem_tui.engine.prediction.outcome import Prediction

__all__ = ["Prediction", "Training", "predict"]
