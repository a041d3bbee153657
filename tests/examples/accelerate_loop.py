"""An `accelerate` loop with gradient accumulation, watched: as a plain one."""

import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from gpumem_tui.watch import watch


def main(steps: int) -> torch.nn.Module:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=64,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters())
    rows = DataLoader(torch.randint(0, 64, (2 * 4 * steps, 16)), batch_size=4)
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=not torch.cuda.is_available())
    model, optimizer, rows = accelerator.prepare(model, optimizer, rows)
    with watch(model, optimizer):
        for ids in rows:
            with accelerator.accumulate(model):
                loss = model(input_ids=ids, labels=ids).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    return model


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
