"""The damage of quantization to weights: measured tensor by tensor, on a CPU, from the file they lie in.

```
checkpoint.py      a safetensors file, a model's folder, a hub id -> the tensors, none of them loaded
random_weights.py  a configuration -> the tensors that a run of it would draw
bits.py            floats as the integers of their bits: extremes in one pass at the speed of memory
survey.py          that pass over a tensor; survey_processes.py has several made at a time
sample.py          what of a tensor is measured: runs that stand for all, and its values without their places
piece.py           the same as a scheme gets it
scheme.py          what a scheme is; schemes/ holds one file a family, found by walking the folder
measure.py         a tensor under every scheme: errors, codes, entropy
report.py          what is then known of it, as figures
lens.py            a model: the tensors one after the other, on every core, as a stream of reports
totals.py          the tensors together; which few of them should stay in 16 bit
document.py        all of it as JSON
measurement.py     the same from a process of its own, for the app; process.py is that process
```
"""
