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
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_minicpm4 import PGPTQQuantizer
from transformers_minicpm4.cli.assets import smollm2_path
from transformers_minicpm4.model.prefix_cache import PrefixCache
from transformers_minicpm4.quantization.export.gptq import load_gptq
from transformers_minicpm4.quantization.p_gptq.solver import round_to_nearest


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
    parser.add_argument("--text", type=Path, help="calibration text, default Python's manual pages")
    parser.add_argument("--group_size", type=int, default=64)
    parser.add_argument("--num_samples", type=int, default=6)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--output", type=Path, help="new folder, default a temporary one")
    args = parser.parse_args()

    source = args.model or smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    text = args.text.read_text(encoding="utf-8") if args.text else "\n\n".join(topics[name] for name in sorted(topics))
    # The last tenth is held out.
    calibration, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
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
