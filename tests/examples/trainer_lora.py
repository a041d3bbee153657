"""`transformers.Trainer` with LoRA and checkpointing, watched: one callback."""

import sys
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Trainer, TrainingArguments

from gpumem_tui.watch import MemoryCallback


def main(steps: int) -> torch.nn.Module:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=64,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = get_peft_model(GPTNeoXForCausalLM(config), LoraConfig(target_modules=["query_key_value"]))
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 64, (16, 16))]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=4, gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False}, report_to=[], use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows, callbacks=[MemoryCallback()]).train()
    return model


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
