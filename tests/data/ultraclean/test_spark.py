"""Spark gives what `datasets` gives, in any order, with real Java and Python workers."""

import gzip
import json
import os
import shutil
import sys
from collections import Counter
from dataclasses import dataclass

import pytest
from datasets import Dataset, Value

from transformers_minicpm4.data.ultraclean.decontaminate import ContaminationFilter, NgramDecontaminator
from transformers_minicpm4.data.ultraclean.deduplicate import MinHashSignature
from transformers_minicpm4.data.ultraclean.normalize import to_words
from transformers_minicpm4.data.ultraclean.scorer import QualityScorer
from transformers_minicpm4.data.ultraclean.spark import score_with_spark


JAVA = shutil.which("java") or os.path.exists(os.path.join(os.environ.get("JAVA_HOME", ""), "bin", "java"))
pytestmark = [
    pytest.mark.skipif(not JAVA, reason="Spark needs Java: no java on PATH and no JAVA_HOME"),
    # Spark leaves sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    # pyspark 4.3 says so to every user of mapInArrow, which needs no pandas of any version; until it supports 3.
    pytest.mark.filterwarnings("ignore:PySpark does not yet fully support pandas:FutureWarning"),
]


@dataclass(frozen=True)
class Shape:
    """Without declared types; replaces a column; all null where Spark looks at first."""

    def __call__(self, batch):
        texts = batch["text"]
        return {
            "source": [s.upper() for s in batch["source"]],
            "length": [len(t or "") for t in texts],
            "share": [len(t) / 7 if t else None for t in texts],
            "reason": ["no text" if not t else None for t in texts],
            "words": [(t or "").split()[:3] for t in texts],
        }


@pytest.fixture(scope="module")
def spark(tmp_path_factory):
    sql = pytest.importorskip("pyspark.sql", reason="pyspark is not installed")
    patch = pytest.MonkeyPatch()
    patch.setenv("PYSPARK_PYTHON", sys.executable)
    patch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    session = (
        sql.SparkSession.builder.master("local[2]")
        .config("spark.ui.enabled", "false")
        .config("spark.sql.shuffle.partitions", "2")
        .config("spark.local.dir", str(tmp_path_factory.mktemp("spark")))
        .config("spark.sql.warehouse.dir", str(tmp_path_factory.mktemp("warehouse")))
        .config("spark.driver.host", "127.0.0.1")
        .getOrCreate()
    )
    yield session
    session.stop()
    patch.undo()


@pytest.fixture
def rows(shared_data):
    rows = []
    for language in ("en", "zh"):
        with gzip.open(shared_data / "debian-docs-quality" / f"{language}.jsonl.gz", "rt", encoding="utf-8") as lines:
            rows += [{**row, "n": n, "text": row["text"][:800]} for row, n in zip(map(json.loads, lines), range(150))]
    rows[200]["text"], rows[250]["text"] = None, ""
    return rows


@dataclass(frozen=True)
class All:
    """Several callables in one: each stage of its own would start Python workers that import torch."""

    functions: tuple

    def __call__(self, batch):
        return {name: values for function in self.functions for name, values in function(batch).items()}


def test_spark_equals_datasets(spark, rows, tmp_path):
    from pyspark import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # these classes live in a test, not in a package
    data = Dataset.from_list(rows).cast_column("n", Value("int32"))
    for part in (0, 1):
        data.shard(2, part).to_parquet(tmp_path / f"{part}.parquet")
    frame = spark.read.parquet(str(tmp_path))
    decontaminator = NgramDecontaminator.from_texts({"quiz": [row["text"] for row in rows[140:160]]})
    function = All((Shape(), decontaminator, MinHashSignature(num_perm=16)))
    scored = score_with_spark(frame, function, batch_size=64)
    assert scored.columns[:7] == frame.columns
    types = dict(scored.dtypes)
    assert (types["n"], types["reason"], types["minhash"]) == ("int", "string", "array<bigint>")
    # Declared types are those found by looking.
    declared = score_with_spark(frame, decontaminator).dtypes
    assert declared[7:] == [(name, types[name]) for name in decontaminator.added_columns]

    found = sorted((row.asDict() for row in scored.collect()), key=lambda row: row["id"])
    expected = data.map(function, batched=True).to_list()
    assert found == sorted(expected, key=lambda row: row["id"])
    assert sum(row["contaminated"] for row in found) >= 20
    assert [row["reason"] for row in found].count("no text") == 2


def test_quality_scores_equal_those_of_datasets(spark, rows, tmp_path):
    fasttext = pytest.importorskip("fasttext", reason="no module fasttext is installed")
    # English against Chinese.
    lines = [f"__label__{'neg' if n < 150 else 'pos'} {to_words(row['text'] or '')}" for n, row in enumerate(rows)]
    (tmp_path / "train.txt").write_text("\n".join(lines))
    settings = {
        "dim": 4,
        "epoch": 10,
        "lr": 1.0,
        "minCount": 1,
        "bucket": 1000,
        "wordNgrams": 2,
        "thread": 1,
        "verbose": 0,
    }
    fasttext.train_supervised(str(tmp_path / "train.txt"), **settings).save_model(str(tmp_path / "model.bin"))
    scorer = QualityScorer(tmp_path / "model.bin")
    # The first batches have no score at all.
    texts = [None, "", " ", "</s>"] * 8 + [row["text"] for row in rows]
    data = Dataset.from_dict({"n": list(range(len(texts))), "text": texts})
    data.to_parquet(tmp_path / "rows.parquet")
    scored = score_with_spark(spark.read.parquet(str(tmp_path / "rows.parquet")), scorer, batch_size=16)
    assert scored.dtypes[2:] == [
        ("quality_score", "double"),
        ("quality_label", "string"),
        ("quality_reason", "string"),
    ]
    found = sorted((row.asDict() for row in scored.collect()), key=lambda row: row["n"])
    assert found == data.map(scorer, batched=True).to_list()
    assert min(Counter(row["quality_label"] for row in found).values()) > 30
    reasons = Counter(row["quality_reason"] for row in found)
    assert reasons == {"missing": 9, "empty": 9, "only whitespace": 8, "no words": 8, None: len(rows) - 2}


def test_types_by_hand_and_errors(spark):
    empty = spark.sql("select 'a' as text where false")
    with pytest.raises(ValueError, match=r"pass columns=\{name: type\}"):
        score_with_spark(empty, Shape())
    typed = score_with_spark(empty, Shape(), columns={"length": "int", "words": "array<string>"})
    assert typed.dtypes == [("text", "string"), ("length", "int"), ("words", "array<string>")]
    with pytest.raises(TypeError, match=r"ContaminationFilter gave list, .*DataFrame.where"):
        score_with_spark(spark.sql("select false as contaminated, '' as contaminated_by"), ContaminationFilter())
    with pytest.raises(ValueError, match="batch_size=0"):
        score_with_spark(empty, Shape(), batch_size=0)
