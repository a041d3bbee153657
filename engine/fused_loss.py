"""The loss of a language model without its logits: head and cross entropy in one, piece by piece.

    ChunkedCrossEntropy   TRL's algorithm: tiles of the logits are made, used and made again in backward
    fuse                  has a transformers model compute its loss so, or through a library's function

Shapes: N tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .config import UserError

TOKENS, WORDS = 4096, 32_768
"""A tile: what is known of the logits at once (TRL's `TOKEN_CHUNK_SIZE` and `_CHUNKED_LOGPROB_CHUNK_SIZE`)."""

ROWS = 128
"""Rows of a tile in float32 at once; TRL's Triton kernel has them in registers."""

IGNORED = -100
"""The label of a token that is not trained on."""


class Scaling(NamedTuple):
    """The change a model makes to the product of hidden states and head before the softmax.

    Attributes:
        factor: Multiplied with.
        softcap: The logits' bound, `softcap * tanh(x / softcap)`; None: there is none.
    """

    factor: float = 1.0
    softcap: float | None = None

    def __call__(self, product: Tensor) -> Tensor:
        """The logits of a product, float32 and in its place."""
        if self.factor != 1.0:
            product.mul_(self.factor)
        if self.softcap is not None:
            product.div_(self.softcap).tanh_().mul_(self.softcap)
        return product

    def through(self, gradient: Tensor, logits: Tensor | None) -> Tensor:
        """The gradient of the product, from that of the logits and in its place."""
        if self.softcap is not None and logits is not None:
            gradient.mul_(logits.div_(self.softcap).square_().neg_().add_(1.0))
        return gradient.mul_(self.factor) if self.factor != 1.0 else gradient


def scaling_of(config: Any) -> Scaling:
    """A transformers configuration's own, as TRL reads it."""
    text = config.get_text_config()
    factors = (getattr(text, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"))
    factor = next((f for f in factors if f is not None), None)
    if factor is None and (divisor := getattr(text, "logits_scaling", None)) is not None:
        factor = divisor if text.model_type == "hyperclovax" else 1 / divisor
    return Scaling(1.0 if factor is None else float(factor), getattr(text, "final_logit_softcapping", None))


class ChunkedCrossEntropy(torch.autograd.Function):
    """Log-probability of each target, from a sum of exponentials that runs over the vocabulary's tiles.

    Backward makes every tile again, turns it into the logits' gradient in place and
    adds up the gradients' products in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scaling: Scaling
    ) -> Tensor:
        """Log-probabilities [N], float32, of hidden [N, H], weight [V, H], bias [V] and targets [N]."""
        device, count = hidden.device, len(hidden)
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden.dtype
        highest = torch.full((count,), float("-inf"), device=device)
        total, at_target = (torch.zeros(count, device=device) for _ in range(2))
        for tokens, words, tile, _, _ in _tiles(hidden, weight, bias, dtype):
            top = torch.maximum(highest[tokens], scaling(tile.amax(-1).float()))
            total[tokens] *= torch.exp(highest[tokens] - top)
            highest[tokens] = top
            for rows in _pieces(len(tile), ROWS):
                logits = scaling(tile[rows].to(torch.float32, copy=True))
                total[tokens][rows] += logits.sub_(top[rows, None]).exp_().sum(-1)
            inside, index = _within(targets[tokens], words)
            found = scaling(tile.gather(-1, index[:, None])[:, 0].float())
            at_target[tokens] = torch.where(inside, found, at_target[tokens])
        log_total = highest + total.log_()
        ctx.save_for_backward(hidden, weight, bias, targets, log_total)
        ctx.dtype, ctx.scaling = dtype, scaling
        return at_target - log_total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Gradients of hidden, weight and bias where they are wanted."""
        (gradient,) = gradients
        hidden, weight, bias, targets, log_total = ctx.saved_tensors
        made = [
            torch.zeros(tensor.shape, device=tensor.device) if wanted else None
            for tensor, wanted in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        ]
        of_hidden, of_weight, of_bias = made
        for tokens, words, tile, states, weights in _tiles(hidden, weight, bias, ctx.dtype):
            _logits_gradient_(tile, ctx.scaling, log_total[tokens], gradient[tokens], targets[tokens], words)
            if of_hidden is not None:
                _add_product_(of_hidden[tokens], tile, weights)
            if of_weight is not None:
                _add_product_(of_weight[words], tile.t(), states)
            if of_bias is not None:
                of_bias[words] += tile.sum(0, dtype=torch.float32)
        of_inputs = (None if g is None else g.to(t.dtype) for g, t in zip(made, (hidden, weight, bias), strict=True))
        return *of_inputs, None, None


def _tiles(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Any:
    """Tokens, words, their product [tokens, words] in one buffer for all, and its two factors."""
    buffer = torch.empty((min(len(hidden), TOKENS), WORDS), device=hidden.device, dtype=dtype)
    for tokens in _pieces(len(hidden), TOKENS):
        states = hidden[tokens].to(dtype)
        for words in _pieces(len(weight), WORDS):
            weights = weight[words].to(dtype)
            tile = buffer[: len(states), : len(weights)]
            torch.mm(states, weights.t(), out=tile)
            if bias is not None:
                tile.add_(bias[words].to(dtype))
            yield tokens, words, tile, states, weights


def _pieces(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _within(targets: Tensor, words: slice) -> tuple[Tensor, Tensor]:
    """A mask of the targets among these words, and their indices there; the others' indices are any."""
    index = targets - words.start
    return (index >= 0) & (index < words.stop - words.start), index.clamp_(0, words.stop - words.start - 1)


def _logits_gradient_(
    tile: Tensor, scaling: Scaling, log_total: Tensor, gradient: Tensor, targets: Tensor, words: slice
) -> None:
    """Overwrite a tile with the gradient of its product: `gradient * (1[target] - softmax)`."""
    inside, index = _within(targets, words)
    for rows in _pieces(len(tile), ROWS):
        logits = scaling(tile[rows].to(torch.float32, copy=True))
        kept = logits.clone() if scaling.softcap is not None else None
        of_logits = logits.sub_(log_total[rows, None]).exp_().mul_(-gradient[rows, None])
        of_logits.scatter_add_(1, index[rows, None], torch.where(inside[rows], gradient[rows], 0.0)[:, None])
        tile[rows] = scaling.through(of_logits, kept)


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, the product not rounded to 16 bit before it is added."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.device == torch.device("cpu"):  # a prediction's GPU is `cpu:0`
        total.addmm_(left.float(), right.float())
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


# --- in a model -------------------------------------------------------------------


Compute = Callable[[Tensor, Any, Tensor, Scaling], Tensor]
"""The mean loss, from hidden [N, H], the head, labels [N] and what the model does to its logits."""


def chunked(hidden: Tensor, head: Any, labels: Tensor, scaling: Scaling) -> Tensor:
    """TRL's algorithm."""
    trained = labels != IGNORED
    found = ChunkedCrossEntropy.apply(hidden, head.weight, head.bias, labels.clamp(min=0), scaling)  # type: ignore[no-untyped-call]
    loss: Tensor = -found.masked_fill(~trained, 0).sum() / trained.sum().clamp(min=1)
    return loss


def linear_cross_entropy(hidden: Tensor, head: Any, labels: Tensor, _scaling: Scaling) -> Tensor:
    """PyTorch's own, from 2.13 on, in chunks of its choice; autocast does not reach inside it."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    bias = None if head.bias is None else head.bias.to(dtype)
    loss: Tensor = functional.linear_cross_entropy(
        hidden.to(dtype), head.weight.to(dtype), labels, linear_bias=bias,
        options=torch.nn.LinearCrossEntropyOptions(),
    )  # fmt: skip
    return loss


def liger(hidden: Tensor, head: Any, labels: Tensor, scaling: Scaling) -> Tensor:
    """Liger's Triton kernel."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss: Tensor = LigerFusedLinearCrossEntropyLoss(softcap=scaling.softcap)(head.weight, hidden, labels, head.bias)
    return loss


class FusedLoss(torch.nn.Module):
    """Part of a model under the name of the loss, so that what it allocates is seen to be the loss's.

    Args:
        head: Finds the output embedding, which whatever wraps the model may have replaced.
        compute: The loss.
        scaling: Of the logits.
    """

    def __init__(self, head: Callable[[], Any], compute: Compute, scaling: Scaling) -> None:
        super().__init__()
        self.head, self.compute, self.scaling = head, compute, scaling

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of hidden [batch, seq, H] against labels [batch, seq], each token's being the next.

        Raises:
            UserError: The head has an adapter, which would never be used.
        """
        head = self.head()
        if hasattr(head, "base_layer"):
            raise UserError("the loss multiplies by the head's weight itself: take the head out of lora.targets")
        tokens, following = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return self.compute(tokens, head, following, self.scaling)


def fuse(model: Any, compute: Compute) -> Any:
    """Have a transformers model return its loss and no logits where it is given labels."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    plain = model.forward
    model.add_module("loss", FusedLoss(model.get_output_embeddings, compute, scaling_of(model.config)))

    def forward(self: Any, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None:
            return plain(*args, **kwargs)
        outputs = self.base_model(*args, **kwargs)
        loss = self.loss(outputs.last_hidden_state, labels)
        return CausalLMOutputWithPast(loss=loss, past_key_values=outputs.past_key_values)

    model.forward = MethodType(forward, model)
    return model
