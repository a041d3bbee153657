"""Memory of cuDNN's recurrent layers: weights, the reserve kept for backward, the workspace of each pass.

cuDNN is asked for these sizes and its documentation gives none. The formulas are
fitted to 395 layers measured on an H100 with torch 2.11 (`tests/benchmarks/results/recurrent.json`).
Sizes are sums of buffers in whole multiples of the hidden states of a time step,
of those of all time steps and of the input, each buffer padded to 32 bytes. Rows that
are not packed are laid out anew, and so are their gradients. Inference takes no
buffers for products of gradients; the forward pass of training does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .gpus import Gpu

RELU, TANH, LSTM, GRU = range(4)
"""cuDNN's `cudnnRNNMode_t`."""

GATES = {RELU: 1, TANH: 1, LSTM: 4, GRU: 3}
SMALL_STEPS = {RELU: 9, TANH: 9, LSTM: 12, GRU: 14}
"""Hidden states of all time steps that small and persistent kernels take more for products of gradients."""
PRODUCTS_BYTES = 8 << 20
"""Scratch of the products of a layer in one direction."""
STATE_OF_THREAD_BYTES = 24
"""State of dropout's random numbers."""
BUFFER_BYTES = 32
HEAD_BYTES, LENGTH_BYTES = 256, 8
STEPS_AT_ONCE = 256
"""Time steps whose gates are computed together in one direction; at least 300 in both directions."""
LONG_STEPS = 128
"""Time steps from which on a wavefront through the layers is longer."""
WAVE_ROWS = 128
"""Rows of a product that a wavefront is made long enough for."""


def dropout_state_bytes(multiprocessors: int, threads: int) -> int:
    """Bytes of the random numbers' states for dropout, one for each thread that the GPU can run at once.

    6,488,064 on an H100. PyTorch has cuDNN make them once for the device.

    Args:
        multiprocessors: Of the GPU.
        threads: Resident threads per multiprocessor.
    """
    return multiprocessors * threads * STATE_OF_THREAD_BYTES


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
        training: Whether a reserve is kept for backward.
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
    training: bool = True

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
            bits = self._projected(states) // self.dtype.itemsize
            kept += (self.layers - 1) * self.directions * _padded(-(-bits // 8))
        return HEAD_BYTES + kept

    def workspace_bytes(self, gpu: Gpu, forward: bool, whole: bool = False) -> int:
        """Bytes of scratch of the forward pass, or of each of the two passes of backward.

        Gates are computed, in training products of gradients too, in buffers that are used again.

        Args:
            gpu: On which PyTorch chooses the kernels.
            forward: Which pass; it may have other kernels.
            whole: One direction in all time steps at once, however many.
        """
        small = self._small(gpu, forward)
        phases = self._gates_bytes(small, self.steps if whole else min(self.steps, STEPS_AT_ONCE))
        if self.training:
            products = self._products_bytes(small, self.steps if whole else self._wavefront())
            phases = max(phases, products + self._copies_bytes())
        lengths = 0 if self.packed else LENGTH_BYTES * self.rows
        return (
            self.layers * self.directions * PRODUCTS_BYTES
            + _padded(self._matrices() * self.dtype.itemsize)
            + _padded(HEAD_BYTES + lengths)
            + self._copies_bytes()
            + phases
        )

    def unsure_bytes(self, gpu: Gpu, forward: bool) -> int:
        """Bytes that the workspace may have beyond that.

        More time steps at once than were measured; packed rows of unlike lengths laid out as if they were not packed.
        """
        most = replace(self, packed=False).workspace_bytes(gpu, forward, whole=True)
        return most - self.workspace_bytes(gpu, forward)

    def _copies_bytes(self) -> int:
        """Input, output and states, or their gradients, in the layout that only packed rows have already."""
        if self.packed:
            return 0
        layer, step = self.directions * self._layers_bytes(), self.directions * self._steps_bytes()
        states = _buffers(self._projected(layer), 1, 1) + (_buffers(layer, 1, 1) if self.mode == LSTM else 0)
        return _padded(self._inputs_bytes()) + _padded(self._projected(step)) + states

    def _gates_bytes(self, small: bool, at_once: int) -> int:
        gates, both = GATES[self.mode], self.directions == 2
        layers = (gates * self.directions, *both * (4,))
        steps = both * (2, 2) + (4 * gates * (1,) if small else ()) + self._projected_steps()
        if self.dropout and not both:
            steps += (1,)
        of_gates = self.steps if both or small else at_once
        return (
            _buffers(self._layers_bytes(), *(self._states(small) if small else layers), self._cells())
            + _buffers(of_gates * self._step_bytes(), gates * self.directions)
            + _buffers(self._steps_bytes(), *steps)
        )

    def _products_bytes(self, small: bool, wavefront: int) -> int:
        step, more = self._steps_bytes(), SMALL_STEPS[self.mode] if small else 0
        wide = max(step, self._inputs_bytes())
        if self.directions == 2:
            steps: tuple[int, ...] = (2 if self.layers == 1 else 4, *more // 2 * (2,), *more % 2 * (1,))
            widest = _padded(4 * wide)
        else:
            steps = (1 + more) * (1,)
            if self.layers == 1:
                widest = _padded(wide)
            elif small:
                widest = _padded(step) + _padded(wide)
            else:
                widest = _padded(wavefront * self._step_bytes() + wide - step)
        layers = (*self._states(small), self._cells())
        return _buffers(self._layers_bytes(), *layers) + _buffers(step, *steps, *self._projected_steps()) + widest

    def _states(self, small: bool) -> tuple[int, ...]:
        return (4, 2) if self.directions == 2 else (2,) if small else (1,)

    def _cells(self) -> int:
        return 2 * self.directions if self.mode == LSTM else 0

    def _projected_steps(self) -> tuple[int, ...]:
        return (self.directions,) if self.proj_size else ()

    def _wavefront(self) -> int:
        """Time steps that the layers are at, one behind the other."""
        least = 4 if self.steps < LONG_STEPS else 8
        of_layer = next((n for n in (least, 8) if n * self.rows >= WAVE_ROWS), 16)
        of_input = max(of_layer, 8 if self.rows < WAVE_ROWS else 4)
        return min(self.steps, self.layers * of_layer + of_input)

    def _small(self, gpu: Gpu, forward: bool) -> bool:
        """True for kernels that take more: persistent, or for small sizes (PyTorch's `use_rnn_persist_small_h`)."""
        if self.packed or self.proj_size or self.dtype not in (torch.float32, torch.float16):
            return False
        gated = self.mode in (LSTM, GRU)
        largest = (192 if gated else 384) if forward else (128 if gated else 256)
        return self.hidden_size <= largest or (self.dtype is torch.float16 and self._persistent(gpu))

    def _persistent(self, gpu: Gpu) -> bool:
        """True where PyTorch asks for kernels that keep weights on the chip (its `use_persist_*_heuristics`)."""
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
        """Bytes of hidden states that are projected if they are."""
        return states // self.hidden_size * (self.proj_size or self.hidden_size)

    def _inputs_bytes(self) -> int:
        return self.steps * self.rows * self.input_size * self.dtype.itemsize


def _padded(size: int) -> int:
    return -(-size // BUFFER_BYTES) * BUFFER_BYTES


def _buffers(size: int, *multiples: int) -> int:
    return sum(_padded(multiple * size) for multiple in multiples)
