"""The same batched callables on a Spark cluster."""

from collections.abc import Callable
from typing import Any


def score_with_spark(
    dataframe,
    function: Callable[[dict[str, list]], dict[str, list]],
    *,
    batch_size: int = 1000,
    columns: dict[str, str] | None = None,
):
    """Runs a batched map callable (`QualityScorer`, `LanguageTagger`, ...) over a Spark DataFrame.

    Works through `DataFrame.mapInArrow`: Arrow batches go to Python workers and back; rows, columns and their types
    stay, what the callable gives is added, or replaces columns of the same name. The callable is pickled, so this
    package and the files it names (models) must be on every executor. Lazy, as everything in Spark.

    Args:
        dataframe (`pyspark.sql.DataFrame`): with the columns that the callable reads.
        function (callable): from `dict[str, list]` to a `dict[str, list]` of the same length.
        batch_size (`int`, *optional*, defaults to 1000): most rows per call.
        columns (`dict[str, str]`, *optional*): name -> Spark type (`{"quality_score": "double"}`) of the columns that
            the callable gives. Without it they come from the callable's `added_columns`, or else from running it on
            the first ten rows on the driver (strings where it gave only nulls).

    Returns:
        `pyspark.sql.DataFrame`: in no particular order.

    Raises:
        ImportError: no pyspark.
        TypeError: the callable is a filter (use `DataFrame.where` on the columns that a map callable adds).
        ValueError: columns given that the callable does not give, or no row to find the types from.
    """
    try:
        from pyspark.sql.pandas.types import to_arrow_type
        from pyspark.sql.types import StructField, StructType
    except ImportError as error:
        raise ImportError("score_with_spark needs pyspark: pip install pyspark") from error

    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: at least 1 is needed")
    added = _spark_types(dataframe, function, columns)
    fields = {field.name: field for field in dataframe.schema.fields}
    fields.update((name, StructField(name, kind)) for name, kind in added.items())
    schema = StructType(list(fields.values()))
    arrow = {name: to_arrow_type(kind) for name, kind in added.items()}
    return dataframe.mapInArrow(_MapBatches(function, batch_size, arrow, list(fields)), schema)


def _spark_types(dataframe, function, columns) -> dict[str, Any]:
    """Column -> Spark type of what the callable gives."""
    import pyarrow as pa
    from pyspark.sql.pandas.types import from_arrow_type
    from pyspark.sql.types import StructType

    if columns is not None:
        declared = StructType.fromDDL(", ".join(f"`{name}` {kind}" for name, kind in columns.items()))
        return {field.name: field.dataType for field in declared}
    arrow = getattr(function, "added_columns", None)
    if arrow is None:
        rows = dataframe.limit(10).toArrow().to_pydict()
        if not any(rows.values()):
            raise ValueError(
                "the DataFrame has no rows to find the added columns' types from: pass columns={name: type}"
            )
        arrow = {
            name: pa.string() if pa.types.is_null(kind := pa.array(values).type) else kind
            for name, values in _checked(function, function(rows)).items()
        }
    return {name: from_arrow_type(kind) for name, kind in arrow.items()}


def _checked(function, result):
    if not isinstance(result, dict):
        name = getattr(function, "__name__", type(function).__name__)
        raise TypeError(
            f"{name} gave {type(result).__name__}, not a dict of columns: filters do not run here, use "
            f"DataFrame.where on the columns that a map callable adds"
        )
    return result


class _MapBatches:
    """What a Python worker of Spark runs on its record batches."""

    def __init__(self, function, batch_size, added, columns):
        self.function, self.batch_size, self.added, self.columns = function, batch_size, added, columns

    def __call__(self, batches):
        import pyarrow as pa

        for batch in batches:
            for start in range(0, batch.num_rows, self.batch_size):
                rows = batch.slice(start, self.batch_size)
                result = _checked(self.function, self.function(rows.to_pydict()))
                if set(result) != set(self.added):
                    raise ValueError(f"the callable gave columns {sorted(result)}, expected {sorted(self.added)}")
                arrays = dict(zip(rows.schema.names, rows.columns))
                # All batches of a stream need one schema, also where a column is null throughout a batch.
                arrays.update((name, _array(values, self.added[name])) for name, values in result.items())
                yield pa.RecordBatch.from_arrays([arrays[name] for name in self.columns], self.columns)


def _array(values, kind):
    import pyarrow as pa

    # A cast refuses 1.5; pa.array(values, int64) would cut it to 1 without a word.
    return pa.array(values).cast(kind) if pa.types.is_integer(kind) else pa.array(values, kind)
