# /// script
# dependencies = ["transformers_minicpm4[executors]"]
# ///
"""
A checkpoint in another runtime, and whether that says the same.

Without arguments SmolLM2-135M for llama.cpp, layers in 8 bits, in half a minute (`make assets` fetches the weights):

    python examples/executors.py
    python examples/executors.py --model openbmb/MiniCPM4-0.5B --type f16 --output model.gguf --plot pairs.png

docs/executors.md explains the report; `minicpm4 export` and `minicpm4 align` do this from the shell.
"""

import argparse
import os
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

from transformers_minicpm4.edge.alignment import align
from transformers_minicpm4.edge.executors import open_executor
from transformers_minicpm4.edge.executors.gguf_executor import export_gguf


TEXT = (
    "The Danube rises in the Black Forest and flows east for 2,850 kilometres, through or along the border of ten "
    "countries, before it empties into the Black Sea. No other river in the world passes through so many capitals: "
    "Vienna, Bratislava, Budapest and Belgrade all stand on its banks. Once a frontier of the Roman Empire, it is "
    "today one of Europe's most important waterways, joined to the Rhine by a canal that was opened in 1992."
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("MODEL"), help="folder or Hub id; default: SmolLM2-135M")
    parser.add_argument("--type", default="q8_0", help="of the exported layers: f32, f16, bf16, q8_0, ...")
    parser.add_argument("--output", type=Path, help="default: a temporary file")
    parser.add_argument("--plot", type=Path, help="picture of all log-probabilities that were compared")
    parser.add_argument("--prompt", default="What is gravity?")
    args = parser.parse_args()
    if args.model is None:
        from transformers_minicpm4.cli.assets import smollm2_path

        args.model = str(smollm2_path())

    with tempfile.TemporaryDirectory() as folder:
        file = args.output or Path(folder) / "model.gguf"
        export_gguf(args.model, file, args.type)
        print(f"{file.name}: {file.stat().st_size / 1e6:.0f} MB\n")

        tokenizer = AutoTokenizer.from_pretrained(args.model)
        messages = [{"role": "user", "content": args.prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt_ids = tokenizer(prompt)["input_ids"]
        with (
            open_executor(args.model, 512, dtype="float32") as reference,
            open_executor(file, 512) as exported,
        ):
            found = align(reference, exported, tokenizer(TEXT)["input_ids"])
            print(found.report())
            if args.plot:
                found.plot(args.plot)
            print(f"\n> {args.prompt}")
            for executor in (reference, exported):
                answer = executor.generate(prompt_ids, 40, [tokenizer.eos_token_id])
                print(f"{executor.name + ':':7}", tokenizer.decode(answer, skip_special_tokens=True))


if __name__ == "__main__":
    main()
