"""
Filter instruction data and say why, in seconds on a CPU: python examples/ultrachat.py

Every part is a function for `map` that adds a verdict and its reason; dropping is a `filter` of your own.
"""

import json
import random
from pydoc_data.topics import topics

import numpy as np
from datasets import Dataset, disable_progress_bars

from transformers_minicpm4.data.ultrachat.code_filter import CodeFilter
from transformers_minicpm4.data.ultrachat.constraints import ConstraintChecker
from transformers_minicpm4.data.ultrachat.difficulty import DifficultyFilter
from transformers_minicpm4.data.ultrachat.generation import TrackGenerator
from transformers_minicpm4.data.ultrachat.long_context import LongContextPacker
from transformers_minicpm4.data.ultrachat.retrieval import BM25Index
from transformers_minicpm4.data.ultrachat.semantic_dedup import semantic_deduplicate
from transformers_minicpm4.data.ultrachat.text_counts import count_words, find_words
from transformers_minicpm4.data.ultrachat.tool_calls import ToolCallFilter


disable_progress_bars()


def show(title, rows, subject, reason):
    print(f"\n{title}")
    for row in rows:
        print(f"  {' '.join(str(row[subject]).split())[:50]!r:54} {row[reason]}")


# 1. Constraints that a program can verify; Chinese is counted in characters.
rule = [{"type": "words", "at_least": 5, "at_most": 40}, {"type": "bullets", "exactly": 2}]
answers = Dataset.from_dict({"response": ["- 苹果和梨\n- 橘子", "- apples\n- pears", "Apples, pears and oranges."]})
show("Constraints", answers.map(ConstraintChecker(rule)), "response", "constraints_reason")

# 2. Tool calls against the schemas of the tools offered.
parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
tools = json.dumps([{"type": "function", "function": {"name": "get_weather", "parameters": parameters}}])
calls = [
    {"name": "get_weather", "arguments": {"city": "Oslo"}},
    {"name": "get_weather", "arguments": {"city": 3, "day": "Monday"}},
    {"name": "send_mail", "arguments": {}},
]
calls = Dataset.from_dict({"tools": [tools] * 3, "calls": [json.dumps([call]) for call in calls]})
show("Tool calls", calls.map(ToolCallFilter(calls_column="calls")), "calls", "tool_calls_reason")

# 3. Code that runs alone: read, never run.
code = ["import math\nprint(math.pi)", "from builtins import input as i\nage = i()", "import numpy as np", "def f(:"]
show("Code", Dataset.from_dict({"code": code}).map(CodeFilter()), "code", "code_reason")

# 4. Difficulty: what a small model always solves teaches little; what it never solves stays.
results = Dataset.from_dict({"results": [[True] * 4, [True, False, False, True], [False] * 4]})
show("Difficulty", results.map(DifficultyFilter()), "results", "difficulty_reason")

# 5. Semantic deduplication, with the embeddings of any encoder; here counts of words stand in for one.
questions = Dataset.from_dict({"text": ["How far is the moon?", "the moon, how far is it", "How old is the sun?"]})
vocabulary = sorted({word.lower() for text in questions["text"] for word in find_words(text)})


def encode(texts):
    return np.array([[find_words(text.lower()).count(word) for word in vocabulary] for text in texts])


show("Semantic deduplication", semantic_deduplicate(questions, encode, threshold=0.9), "text", "dedup_reason")

# 6. A document at a random place among distractors; real lengths are 8,192 to 65,536 tokens of your tokenizer.
chapters = Dataset.from_dict({"id": sorted(topics), "text": [topics[name] for name in sorted(topics)]})
packer = LongContextPacker(BM25Index(chapters["text"], chapters["id"]), count_words, 2_000, 8_000)
print("\nLong context")
for row in chapters.select(range(1, 4)).map(packer):
    place = f"document {row['document_position']} of {row['distractor_count'] + 1}"
    print(f"  {row['id']!r:54} {row['packed_reason']}: {place}, {row['packed_tokens']:,} words")


# 7. Ask a model until its answer keeps the constraints. PipelineGenerator puts any transformers pipeline here.
draw = random.Random(0)


def generate(messages):
    return " ".join(["word"] * draw.randint(1, 12))


tasks = Dataset.from_dict(
    {"task": ["Name a fruit.", "Name a city."], "constraints": [[{"type": "words", "at_most": 5}]] * 2}
)
asked = tasks.map(TrackGenerator("instruction", generate, max_attempts=10), new_fingerprint="ultrachat-example")
print("\nGeneration")
for row in asked:
    print(f"  {row['task']!r:54} {row['generation_reason']}, attempts: {row['attempt_reasons']}")
