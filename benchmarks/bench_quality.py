"""
Perplexity of SmolLM2-135M-Instruct on WikiText-2, dense against InfLLM v2 with several budgets.

    python benchmarks/bench_quality.py --json benchmarks/results/quality_cpu.json

The weights never saw sparse attention in training, so this is a lower bound on what a model trained with it gives.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from datasets import load_dataset
from harness import report
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_minicpm4 import InfLLMv2Config
from transformers_minicpm4.cli.assets import smollm2_path


BUDGETS = {
    "dense": None,
    "infllm_v2, 40 blocks (topk 16, window 1,536)": InfLLMv2Config(dense_len=-1, topk=16, window_size=1536),
    "infllm_v2, 24 blocks (topk 16, window 512)": InfLLMv2Config(dense_len=-1, topk=16, window_size=512),
    "infllm_v2, 12 blocks (topk 8, window 256)": InfLLMv2Config(dense_len=-1, topk=8, window_size=256),
    "window alone, 12 blocks (topk 2, window 640)": InfLLMv2Config(dense_len=-1, topk=2, window_size=640),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[2] / "shared" / "data" / "wikitext2" / "test.parquet"
    parser.add_argument("--text", default=str(default), help="parquet file with a `text` column (WikiText-2 test)")
    parser.add_argument("--length", type=int, default=4096, help="tokens a segment; its second half is scored")
    parser.add_argument("--segments", type=int, default=3, help="segments from the start of the text")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--json", metavar="FILE", help="write all figures there as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    checkpoint = smollm2_path()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    text = "".join(load_dataset("parquet", data_files=args.text, split="train")["text"])
    wanted = args.length * args.segments
    ids = tokenizer(text[: wanted * 8], return_tensors="pt")["input_ids"][0, :wanted].view(args.segments, -1)
    half = args.length // 2
    rows = []
    for name, config in tqdm(BUDGETS.items(), desc="budgets"):
        model.set_attn_implementation("sdpa" if config is None else "infllm_v2")
        if config is not None:
            model.config.sparse_config = config.to_dict()
        losses = []
        for segment in ids:
            with torch.no_grad():
                logits = model(segment[None], use_cache=False, logits_to_keep=half + 1).logits[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits, segment[-half:]).item())
        loss = sum(losses) / len(losses)
        rows.append({"attention": name, "loss, nats a token": round(loss, 4), "perplexity": round(math.exp(loss), 3)})
        rows[-1]["change"] = f"{math.exp(loss) / rows[0]['perplexity'] - 1:+.1%}"
    report(rows, ["attention", "loss, nats a token", "perplexity", "change"], args.json)


if __name__ == "__main__":
    main()
