# /// script
# dependencies = ["transformers_minicpm4[quantization]"]
# ///
"""
A model to INT4 with P-GPTQ: quantize, save in files that any GPTQ engine reads, load again, compare.

Without arguments SmolLM2-135M, calibrated on Python's own manual pages, in a minute on a CPU (`make assets` fetches
the weights):

    python examples/p_gptq.py
    python examples/p_gptq.py --model Qwen/Qwen2.5-0.5B --text my_corpus.txt --group_size 128 \
        --num_samples 128 --max_length 2048 --output qwen-int4
    python examples/p_gptq.py --train_steps 100

The last trains a small Llama from scratch on the same text in a minute and quantizes that: a model whose weights were
never rounded before, as those of SmolLM2 were (they come from a Q4_1 file).

Prints the held-out perplexity in full precision, rounded to 4 bits, and after P-GPTQ, with the first token's keys and
values computed by the quantized model and as they are stored with the checkpoint. docs/p_gptq.md explains the method,
`optimum-cli minicpm4 quantize --help` is the same as a command.
"""

import argparse
import math
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import ByteLevelBPETokenizer
from tqdm import trange
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from transformers_minicpm4 import PGPTQQuantizer
from transformers_minicpm4.cli.assets import smollm2_path
from transformers_minicpm4.model.prefix_cache import PrefixCache
from transformers_minicpm4.quantization.export.gptq import load_gptq
from transformers_minicpm4.quantization.p_gptq.solver import round_to_nearest


def train(text: str, steps: int, *, batch_size: int = 4, length: int = 256, seed: int = 0):
    """
    A Llama of 3.7 million weights and its tokenizer, from scratch in float32. Every row begins with the bos token;
    `steps` times `batch_size` rows of `length` tokens are read, the text over and over in a new order.
    """
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [text], vocab_size=2048, special_tokens=["<unk>", "<s>", "</s>"], length=len(text), show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    rows = ids[: len(ids) // (length - 1) * (length - 1)].view(-1, length - 1)
    rows = torch.cat([torch.full((len(rows), 1), tokenizer.bos_token_id), rows], dim=1)

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=steps // 10, num_training_steps=steps)
    order = torch.cat([torch.randperm(len(rows)) for _ in range(steps * batch_size // len(rows) + 1)])
    for step in (progress := trange(steps, desc="training")):
        batch = rows[order[step * batch_size : (step + 1) * batch_size]]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress.set_postfix(perplexity=f"{math.exp(loss.item()):.0f}")
    return model.eval(), tokenizer


@torch.no_grad()
def perplexity(model, rows: torch.Tensor, prefix_id: int, prefix: PrefixCache | None = None) -> float:
    """Of `rows` [B, S] after the prefix token, which the model computes itself or is given."""
    if prefix is None:
        head = torch.full((len(rows), 1), prefix_id)
        logits = model(input_ids=torch.cat([head, rows], dim=1)).logits[:, 1:]
    else:
        logits = model(input_ids=rows, past_key_values=prefix.to_cache(model, len(rows)), use_cache=True).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), rows[:, 1:].flatten())
    return math.exp(loss.item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id, default SmolLM2-135M of `make assets`")
    parser.add_argument("--train_steps", type=int, help="train a small model on the text instead of reading one")
    parser.add_argument("--text", type=Path, help="calibration text, default Python's manual pages")
    parser.add_argument("--group_size", type=int, default=64)
    parser.add_argument("--num_samples", type=int, default=6)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--output", type=Path, help="new folder, default a temporary one")
    args = parser.parse_args()

    text = args.text.read_text(encoding="utf-8") if args.text else "\n\n".join(topics[name] for name in sorted(topics))
    # The last tenth is held out.
    calibration, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    if args.train_steps:
        model, tokenizer = train(calibration, args.train_steps)
    else:
        source = args.model or smollm2_path()
        tokenizer = AutoTokenizer.from_pretrained(source)
        # Not bfloat16: many CPUs multiply it three times slower.
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    rows = torch.tensor(tokenizer(held_out, add_special_tokens=False, verbose=False)["input_ids"][: 8 * 256]).view(
        8, -1
    )
    bos = tokenizer.bos_token_id

    print(f"full precision:                    perplexity {perplexity(model, rows, bos):.2f}")
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for module in model.get_decoder().layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data.copy_(round_to_nearest(module.weight, group_size=args.group_size).dequantize())
    print(f"rounded to 4 bits:                 perplexity {perplexity(model, rows, bos):.2f}")
    model.load_state_dict(kept)

    quantizer = PGPTQQuantizer(
        bits=4,
        group_size=args.group_size,
        prefix_ids=[bos],
        dataset=[calibration],
        num_samples=args.num_samples,
        max_length=args.max_length,
    )
    quantizer.quantize_model(model, tokenizer)
    folder = args.output or Path(tempfile.mkdtemp()) / "int4"
    quantizer.save(model, folder, tokenizer=tokenizer)

    model, prefix = load_gptq(folder), PrefixCache.load(folder)
    print(f"P-GPTQ, prefix computed in 4 bits: perplexity {perplexity(model, rows, bos):.2f}")
    print(f"P-GPTQ, prefix as stored:          perplexity {perplexity(model, rows, bos, prefix):.2f}")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(f"{size / 1e6:.1f} MB of weights, embeddings among them, in {folder}")

    if args.train_steps:
        ids = tokenizer("The following", return_tensors="pt")["input_ids"]
    else:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": "What is the capital of France?"}],
            add_generation_prompt=True,
            return_tensors="pt",
        )["input_ids"]
    ids, mask = prefix.prepend(ids)
    output = model.generate(
        ids, attention_mask=mask, past_key_values=prefix.to_cache(model), max_new_tokens=24, do_sample=False
    )
    print("it says:", tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
