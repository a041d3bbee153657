"""What quantization does to weights: measured tensor by tensor, on a CPU, from the file they lie in.

```
checkpoint.py    a safetensors file, a model's folder, a hub id -> the tensors, none of them loaded
random_weights.py  a profile -> the tensors a run of it would draw
bits.py          floats as the integers of their bits: extremes in one pass at the speed of memory
survey.py        that pass over a tensor, and which runs of it are measured
scheme.py        what a scheme is; schemes/ holds one file a family, found by walking the folder
measure.py       a tensor under every scheme: errors, codes, entropy
lens.py          a model: the tensors one after the other, on every core, as a stream of results
keep.py          which few tensors should stay in 16 bit
```
"""
