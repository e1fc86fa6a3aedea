"""The same batched callables as a step of a datatrove pipeline (local, Slurm or Ray executors)."""

import contextlib
from collections.abc import Callable, Iterable


# Standard library only: datatrove pins packages that others do not want and often lives in an environment of its own.


def documents_to_batch(documents: list, text_column: str = "text") -> dict[str, list]:
    """Columns of datatrove documents: text, `id` and all metadata (None where a document lacks a key)."""
    keys = dict.fromkeys(key for document in documents for key in document.metadata)
    batch = {key: [document.metadata.get(key) for document in documents] for key in keys}
    return {
        **batch,
        "id": [document.id for document in documents],
        text_column: [document.text for document in documents],
    }


def update_documents(documents: list, columns: dict[str, list], text_column: str = "text") -> None:
    """Writes columns back: the text column and `id` to the documents themselves, all others to their metadata.

    Raises:
        TypeError: a column of another length.
    """
    for name, values in columns.items():
        if len(values) != len(documents):
            raise TypeError(
                f"the callable gave {len(values)} values in column {name!r} for {len(documents)} documents"
            )
        for document, value in zip(documents, values):
            if name == text_column:
                document.text = value
            elif name == "id":
                document.id = value
            else:
                document.metadata[name] = value


def run_batch(function: Callable, documents: list, text_column: str = "text") -> list[str | None]:
    """Runs a map or filter callable on documents.

    Returns:
        `list[str | None]`: for each document None (it stays) or the reason why a filter drops it.

    Raises:
        TypeError: the callable gave neither a dict of columns nor a list of as many booleans.
    """
    batch = documents_to_batch(documents, text_column)
    result = function(batch)
    name = getattr(function, "__name__", type(function).__name__)
    if isinstance(result, dict):
        update_documents(documents, result, text_column)
        return [None] * len(documents)
    if not isinstance(result, list) or len(result) != len(documents):
        raise TypeError(
            f"{name} gave {type(result).__name__} for {len(documents)} documents: a dict of columns (map) or a list "
            f"of as many booleans (filter) is needed"
        )
    reasons = function.reasons(batch) if hasattr(function, "reasons") else [None] * len(documents)
    return [None if keep else reason or name for keep, reason in zip(result, reasons)]


def _batches(documents: Iterable, size: int):
    batch = []
    for document in documents:
        batch.append(document)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _step_class():
    try:
        from datatrove.pipeline.base import PipelineStep
    except ImportError as error:
        raise ImportError(
            "UltraCleanStep needs datatrove: pip install datatrove, best in an environment of its own (it brings "
            "a fastText, which overwrites others)"
        ) from error

    class UltraCleanStep(PipelineStep):
        """Batched callable as a datatrove step.

        A map callable adds its columns to the documents' metadata; a filter drops documents, counted as
        `dropped_<reason>` in datatrove's statistics and handed to `exclusion_writer`.

        Args:
            function (callable): map or filter, as for `datasets`.
            text_column (`str`, *optional*, defaults to `"text"`): name under which the callable reads the text.
            batch_size (`int`, *optional*, defaults to 1000): documents per call.
            exclusion_writer (`datatrove.pipeline.writers.disk_base.DiskWriter`, *optional*): for dropped documents;
                they get the metadata `filter_reason`.
        """

        type = "UltraClean"

        def __init__(self, function, text_column="text", batch_size=1000, exclusion_writer=None):
            if not callable(function):
                raise TypeError(f"function={function!r}: a batched callable is needed")
            if batch_size < 1:
                raise ValueError(f"batch_size={batch_size}: at least 1 is needed")
            # Before datatrove's own constructor, which names the statistics after the step.
            self.name = getattr(function, "__name__", type(function).__name__)
            super().__init__()
            self.function, self.text_column, self.batch_size = function, text_column, batch_size
            self.exclusion_writer = exclusion_writer

        def run(self, data, rank: int = 0, world_size: int = 1):
            with self.exclusion_writer or contextlib.nullcontext() as writer:
                for documents in _batches(data, self.batch_size):
                    with self.track_time("batch"):
                        reasons = run_batch(self.function, documents, self.text_column)
                    for document, reason in zip(documents, reasons):
                        self.stat_update("total")
                        if reason is None:
                            self.stat_update("forwarded")
                            self.update_doc_stats(document)
                            yield document
                        else:
                            self.stat_update("dropped", f"dropped_{reason}")
                            if writer:
                                document.metadata["filter_reason"] = reason
                                writer.write(document, rank)

    # datatrove pickles steps to its workers: the class must be found under its module's name.
    UltraCleanStep.__qualname__ = "UltraCleanStep"
    return UltraCleanStep


def __getattr__(name):
    # The base class is datatrove's, so the class can only be made where that is installed, on first use.
    if name != "UltraCleanStep":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = _step_class()
    return globals()[name]
