"""TRL's `SFTTrainer` with its defaults, watched: one callback. Needs trl and datasets."""

import sys
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BitsAndBytesConfig, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from gpumem_tui.watch import MemoryCallback

WORDS = ["<unk>", "<pad>", "<eos>", "the", "cat", "sat", "on", "mat"]


def tokenizer() -> PreTrainedTokenizerFast:
    """One of a few words, so that nothing is downloaded."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>", bos_token="<eos>"
    )


def from_folder(folder: str, kind: str, steps: int, length: int = 1024) -> None:
    """As most people call it: a model by its name, all else by default; `lora` and `qlora` as TRL's `ModelConfig`."""
    on_gpu = torch.cuda.is_available()
    adapters = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.05)
    in_4_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as out:
        SFTTrainer(
            folder,
            SFTConfig(out, max_steps=steps, report_to=[], use_cpu=not on_gpu, disable_tqdm=True, save_strategy="no"),
            train_dataset=Dataset.from_dict({"input_ids": [[index % 8 for index in range(length)]] * 64}),
            processing_class=tokenizer(),
            peft_config=None if kind == "full" else adapters,
            quantization_config=in_4_bit if kind == "qlora" else None,
            callbacks=[MemoryCallback()],
        ).train()


def main(steps: int) -> torch.nn.Module:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=64,
        max_position_embeddings=64, bos_token_id=2, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    model: torch.nn.Module = GPTNeoXForCausalLM(config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder, max_steps=steps, report_to=[], use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
            save_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        rows = Dataset.from_dict({"text": ["the cat sat on the mat"] * 32})
        SFTTrainer(
            model, arguments, train_dataset=rows, processing_class=tokenizer(), callbacks=[MemoryCallback()]
        ).train()
    return model


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
