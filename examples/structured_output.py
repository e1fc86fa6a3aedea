# /// script
# dependencies = ["transformers_minicpm4[edge]", "pydantic"]
# ///
"""
Records out of a text: an answer that is JSON of a given form whatever the model, also where tokens are drafted.

Without arguments SmolLM2-135M on this CPU, in half a minute (`make assets` fetches the weights):

    python examples/structured_output.py
    python examples/structured_output.py --model openbmb/MiniCPM4-8B --text people.txt

The form is certain, the facts are the model's. docs/constrained.md says what of JSON Schema is enforced.
"""

import argparse
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field
from transformers import AutoModelForCausalLM, AutoTokenizer

from transformers_minicpm4.generation.constrained import ConstrainedLogitsProcessor, Grammar
from transformers_minicpm4.generation.drafts import PromptLookupDraft
from transformers_minicpm4.generation.speculative import speculative_decode


TEXT = (
    "Anna Lindqvist was born in Uppsala in Sweden in 1984 and is a nurse. Her brother Karl Lindqvist, born in 1991, "
    "builds boats in Bergen in Norway."
)
Short = Annotated[str, Field(max_length=30)]


class Person(BaseModel):
    name: Short
    born: int = Field(ge=1900, le=2030)
    job: Short
    country: Literal["Denmark", "Finland", "Norway", "Sweden"]


class People(BaseModel):
    people: list[Person] = Field(min_length=1, max_length=3)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("MODEL"), help="folder or Hub id; default: SmolLM2-135M")
    parser.add_argument("--text", type=Path, help="a text with people in it; default: two sentences")
    args = parser.parse_args()
    if args.model is None:
        from transformers_minicpm4.cli.assets import smollm2_path

        args.model = str(smollm2_path())

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
    text = args.text.read_text(encoding="utf-8") if args.text else TEXT
    messages = [{"role": "user", "content": f"List the people as JSON.\n\n{text}"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    def answer(**options):
        processor = ConstrainedLogitsProcessor(
            Grammar.json_schema(People), tokenizer, eos_token_id=model.generation_config.eos_token_id
        )
        output = model.generate(**inputs, logits_processor=[processor], max_new_tokens=200, do_sample=False, **options)
        if not processor.is_complete(output)[0]:
            raise SystemExit("the answer was cut at 200 tokens; raise max_new_tokens")
        return tokenizer.decode(output[0, processor.prompt_length :], skip_special_tokens=True)

    plain = answer()
    print(People.model_validate_json(plain).model_dump_json(indent=2))
    draft = PromptLookupDraft()
    drafted = answer(custom_generate=speculative_decode, draft=draft)
    print(f"with drafts the same text: {drafted == plain}")


if __name__ == "__main__":
    main()
