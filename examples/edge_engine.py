# /// script
# dependencies = ["transformers_minicpm4"]
# ///
"""
Generation on a small machine: a plan before any weight is loaded, memory taken once, drafts, two turns of a chat.

Without arguments SmolLM2-135M on this CPU, in half a minute (`make assets` fetches the weights):

    python examples/edge_engine.py
    python examples/edge_engine.py --model openbmb/MiniCPM4-0.5B --context 32768 --compile

`--compile` makes steps faster and the first ones slow: a minute or two for 30 layers on two cores, kept by PyTorch for
the next run. docs/edge_engine.md explains the engine, docs/speculation.md the drafts.
"""

import argparse
import os

from transformers_minicpm4.edge.engine import EdgeEngine
from transformers_minicpm4.generation.drafts import PromptLookupDraft


TEXT = (
    "The del statement deletes names. Deletion of a target list recursively deletes each target, from left to right. "
    "Deletion of a name removes the binding of that name from the local or global namespace."
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("MODEL"), help="folder or Hub id; default: SmolLM2-135M")
    parser.add_argument("--context", type=int, default=1024, help="tokens, prompt and answer together")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    if args.model is None:
        from transformers_minicpm4.cli.assets import smollm2_path

        args.model = str(smollm2_path())

    engine = EdgeEngine.from_pretrained(
        args.model, context=args.context, draft=PromptLookupDraft(), compile=args.compile
    )
    plan = engine.plan
    planned, budget = plan.total_bytes / 1e9, plan.budget_bytes / 1e9
    print(f"{plan.device.name}: {planned:.2f} GB planned of {budget:.1f}, {plan.precision}")

    messages = [{"role": "user", "content": f"Repeat this text word for word:\n\n{TEXT}"}]
    for turn in range(2):
        print(f"\n> {messages[-1]['content'].splitlines()[0]}")
        for piece in engine.stream(messages, max_new_tokens=args.max_new_tokens):
            print(piece, end="", flush=True)
        answer = engine.last
        print(
            f"\n[{answer.prompt_tokens} tokens of prompt, {answer.reused_tokens} of them in the cache; "
            f"{len(answer.token_ids)} written in {answer.passes} passes]"
        )
        if turn == 0:
            messages += [
                {"role": "assistant", "content": answer.text},
                {"role": "user", "content": "Now the first sentence again."},
            ]


if __name__ == "__main__":
    main()
