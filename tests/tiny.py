"""Tiny random models as real Hugging Face folders, written by transformers and tokenizers themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
"""With an old context this short, a few hundred positions reach all three bands of frequencies."""

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tiny_checkpoint(
    folder: Path | str,
    config_class: type[PretrainedConfig],
    fields: dict[str, Any],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a random decoder of any architecture; `fields` are those of its configuration class.

    The matrices are as wide as the configuration says (`initializer_range`, `init_std`: 0.1 is wide enough for a
    wrong one to show); norms and biases get noise, so that one which is left out shows.
    """
    folder = Path(folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config_class(**fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                noise = torch.empty_like(parameter).normal_(0.0, 0.1, generator=generator)
                parameter.add_(noise)
    torch.nn.Module.to(model, dtype)  # transformers' own wrapper has no usable type
    model.save_pretrained(folder)
    return folder


def tiny_llama(folder: Path | str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Write a random Llama of unusual shape; `overrides` are fields of transformers' LlamaConfig."""
    fields: dict[str, Any] = {
        "hidden_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "intermediate_size": 97,
        "vocab_size": 131,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return tiny_checkpoint(folder, LlamaConfig, {**fields, **overrides}, seed=seed, dtype=dtype)


def tiny_model_folder(path: Path | str, seed: int = 0, **overrides: Any) -> Path:
    """A tiny Llama with a byte-level tokenizer and a ChatML template: all that a server needs.

    Every text can be encoded. The vocabulary of the weights is wider than the tokenizer's, as in
    many real models: ids above must never be sampled.
    """
    tokenizer = _byte_level_tokenizer()
    fields: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "vocab_size": tokenizer.get_vocab_size() + 21,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    folder = tiny_llama(path, seed=seed, dtype=torch.bfloat16, **{**fields, **overrides})
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[2],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [2, 0]}))
    return folder


def _byte_level_tokenizer() -> Tokenizer:
    """BPE over bytes with a few merges, so that tokens of several letters and parts of UTF-8 occur."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIAL_TOKENS) + 256 + 40,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the ship and the sea and the other ship", "système naïf, déjà vu"] * 10, trainer)
    return tokenizer
