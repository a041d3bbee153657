"""Memory of cuDNN's recurrent layers: weights, the reserve kept for backward, the workspace of each pass.

cuDNN is asked for these sizes and its documentation gives none. The formulas are
fitted to 230 layers measured on an H100 with torch 2.11 (`tests/benchmarks/results/recurrent.json`).
Sizes are sums of buffers in whole multiples of the hidden states of a time step,
of those of all time steps and of the input, each buffer padded to 32 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .gpus import Gpu

RELU, TANH, LSTM, GRU = range(4)
"""cuDNN's `cudnnRNNMode_t`."""

GATES = {RELU: 1, TANH: 1, LSTM: 4, GRU: 3}
SMALL_STEPS = {RELU: 9, TANH: 9, LSTM: 12, GRU: 14}
"""Hidden states of all time steps that the kernels for small hidden sizes take more, in each direction."""
PRODUCTS_BYTES = 8 << 20
"""Scratch of the products of a layer in one direction."""
BUFFER_BYTES = 32
HEAD_BYTES, ROW_BYTES = 256, 8
LONG_STEPS = 128
"""Time steps above which a wavefront through the layers is longer; between 100 and 256."""
WAVE_ROWS = 128
"""Rows of a product that a wavefront is made long enough for."""


@dataclass(frozen=True)
class RecurrentLayers:
    """A call of cuDNN's RNN over rows of one length.

    Attributes:
        mode: Of cuDNN.
        input_size: Of a time step.
        hidden_size: Of each direction.
        proj_size: Of the projected hidden states of an LSTM; 0: they are not projected.
        layers: How many.
        directions: 1 or 2.
        dtype: Of input and weights.
        steps: Time steps.
        rows: Of the batch.
        dropout: Whether there is any between layers.
        packed: Whether the rows are given packed.
    """

    mode: int
    input_size: int
    hidden_size: int
    proj_size: int
    layers: int
    directions: int
    dtype: torch.dtype
    steps: int = 1
    rows: int = 1
    dropout: bool = False
    packed: bool = False

    @property
    def weights(self) -> int:
        """Elements of the one buffer of all weights; it has room for biases also where there are none."""
        return self._matrices() + 2 * GATES[self.mode] * self.hidden_size * self.layers * self.directions

    @property
    def reserve_bytes(self) -> int:
        """Bytes kept from forward to backward: gates and states, and a bit for each element that dropout looks at."""
        states = self.directions * self._steps_bytes()
        of_layer = {LSTM: 5, GRU: 6}.get(self.mode, 1)
        kept = _buffers(states, of_layer * self.layers, self.layers - 1)
        if self.proj_size:
            kept += _padded(self.layers * (states + self._projected(states)))
        if self.dropout:
            kept += (self.layers - 1) * self.directions * _padded(-(-states // self.dtype.itemsize // 8))
        return HEAD_BYTES + kept

    def workspace_bytes(self, forward: bool) -> int:
        """Bytes of scratch of the forward pass, or of each of the two passes of backward."""
        return (
            self.layers * self.directions * PRODUCTS_BYTES
            + _padded(self._matrices() * self.dtype.itemsize)
            + _padded(HEAD_BYTES + ROW_BYTES * self.rows)
            + _padded(self._inputs_bytes())
            + self._phases_bytes(self._small(forward), self._wavefront())
        )

    def unsure_bytes(self, gpu: Gpu, forward: bool) -> int:
        """Bytes that the workspace may have beyond that, where too little has been measured."""
        if self.packed or self._persistent(gpu, forward):
            return self.workspace_bytes(forward)
        small = self._small(forward)
        whole = self._phases_bytes(small, self.steps) - self._phases_bytes(small, self._wavefront())
        return whole + self.directions * self._projected(self._steps_bytes())

    def _phases_bytes(self, small: bool, wavefront: int) -> int:
        """Gates are computed, and products with the input; the buffers of the one are used again by the other."""
        return max(self._gates_bytes(small), self._products_bytes(small, wavefront))

    def _gates_bytes(self, small: bool) -> int:
        """Never the more in a plain RNN."""
        layers: tuple[int, ...]
        steps: tuple[int, ...]
        before = 0  # multiples of the states before, which are those that are projected
        if self.mode == LSTM and self.directions == 2:
            layers, steps = (2, 4, 4, 8) if small else (2, 2, 2, 2, 4, 8), (8, *(11 if small else 3) * (2,))
            before = 0 if small else 4
        elif self.mode == LSTM:
            layers, steps = (1, 1, 1, 1, 4), (4, *(17 if small else 1) * (1,))
            before = 0 if small else 2
        elif self.mode == GRU:
            layers, steps = ((2, 2, 4, 6), (2, 2, 2, 6)) if self.directions == 2 else ((1, 1, 3), (1, 3))
        else:
            return 0
        if self.dropout and self.directions == 1:
            steps += (1,)
        layer, step = self._layers_bytes(), self._steps_bytes()
        projected = _padded(self.directions * self._projected(step)) if self.proj_size else 0
        states = _padded(before * (self._projected(layer) if self.proj_size else layer))
        return _buffers(layer, *layers) + states + _buffers(step, *steps) + projected

    def _products_bytes(self, small: bool, wavefront: int) -> int:
        step, inputs, more = self._steps_bytes(), self._inputs_bytes(), SMALL_STEPS[self.mode] if small else 0
        wide = max(step, inputs)
        if self.directions == 2:
            layers: tuple[int, ...] = (4, 4, *9 * (2,)) if self.mode == LSTM else (4, *5 * (2,))
            steps: tuple[int, ...] = (2, 2, 2 if self.layers == 1 else 4, *more // 2 * (2,), *more % 2 * (1,))
            widest = _padded(4 * wide)
        else:
            layers = (2, *(10 if small else 9) * (1,)) if self.mode == LSTM else (2, 1, 1, 1, 1) if small else 5 * (1,)
            steps = (3 + more) * (1,)
            if self.layers == 1:
                widest = _padded(wide)
            elif small and self.mode != LSTM:
                widest = _padded(step) + _padded(wide)
            else:
                widest = _padded(wavefront * self._step_bytes() + wide - step)
        return _buffers(self._layers_bytes(), *layers) + _buffers(step, *steps) + _padded(inputs) + widest

    def _wavefront(self) -> int:
        """Time steps that the layers are at, one behind the other."""
        least = 4 if self.steps <= LONG_STEPS else 8
        of_layer = max(least, -(-WAVE_ROWS // self.rows))
        of_input = max(of_layer, 8 if self.rows < WAVE_ROWS else 4)
        return min(self.steps, self.layers * of_layer + of_input)

    def _small(self, forward: bool) -> bool:
        """True for the kernels for small hidden sizes: `use_rnn_persist_small_h` of `native/cudnn/RNN.cpp`."""
        if self.packed or self.proj_size or self.dtype not in (torch.float32, torch.float16):
            return False
        gated = self.mode in (LSTM, GRU)
        return self.hidden_size <= ((192 if gated else 384) if forward else (128 if gated else 256))

    def _persistent(self, gpu: Gpu, forward: bool) -> bool:
        """True where PyTorch asks for kernels that keep weights on the chip (`use_persist_*_heuristics` there)."""
        if self._small(forward) or self.proj_size or self.dtype is not torch.float16:
            return False
        sizes = (self.hidden_size, self.input_size)
        alone = self.layers == self.directions == 1 and self.hidden_size <= 1024
        if not alone or any(size % 128 for size in sizes) or self.rows % 8 or self.rows > 128:
            return False
        if gpu.capability[0] == 7:
            return gpu.capability != (7, 5)
        if self.mode == GRU or gpu.capability[1] == 6 or gpu.multiprocessors < 98:
            return False
        return self.mode == LSTM or self.rows < 96 or self.hidden_size < 896

    def _matrices(self) -> int:
        """Elements of all weights without biases."""
        out = self.proj_size or self.hidden_size
        inputs = self.input_size + out + (self.layers - 1) * (self.directions + 1) * out
        gates = GATES[self.mode] * self.hidden_size * inputs
        return self.directions * (gates + self.layers * self.hidden_size * self.proj_size)

    def _step_bytes(self) -> int:
        """Hidden states of a layer in one direction after one time step."""
        return self.rows * self.hidden_size * self.dtype.itemsize

    def _steps_bytes(self) -> int:
        return self.steps * self._step_bytes()

    def _layers_bytes(self) -> int:
        return self.layers * self._step_bytes()

    def _projected(self, states: int) -> int:
        """Bytes of hidden states that are projected; 0 where none are."""
        return states // self.hidden_size * self.proj_size

    def _inputs_bytes(self) -> int:
        return self.steps * self.rows * self.input_size * self.dtype.itemsize


def _padded(size: int) -> int:
    return -(-size // BUFFER_BYTES) * BUFFER_BYTES


def _buffers(size: int, *multiples: int) -> int:
    return sum(_padded(multiple * size) for multiple in multiples)
