"""Language of documents, by py3langid (140 languages, model in the package, no network)."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .deduplicate import check_texts
from .normalize import unicode_form


@lru_cache(maxsize=4)
def _identifier(languages):
    """Identifier and the confidence it gives to a text without any evidence; loaded once per process."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise ImportError("LanguageTagger needs py3langid: pip install transformers_minicpm4[data]") from error
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    if languages is not None:
        try:
            identifier.set_languages(languages)
        except ValueError as error:
            raise ValueError(f"languages={languages}: {error}; known are {sorted(identifier.labels)}") from error
    return identifier, identifier.classify("")[1]


@dataclass(frozen=True)
class LanguageTagger:
    """Batched callable for `Dataset.map`: adds the language of each text and the confidence in it.

    Null where nothing can be said: None, blank, no letter, or no feature that the model knows. `"zxx"` is the model's
    own answer for text that is no language (markup, tables).

    Args:
        text_column (`str`, *optional*, defaults to `"text"`): column to read.
        languages (`tuple[str, ...]`, *optional*): ISO 639 codes to choose among; None: all of the model.
        column (`str`, *optional*, defaults to `"language"`): column to add with the ISO 639 code; the probability
            (0 to 1) goes to `<column>_confidence`.
    """

    text_column: str = "text"
    languages: tuple[str, ...] | None = None
    column: str = "language"

    def __post_init__(self):
        if isinstance(self.languages, str):
            raise TypeError(f"languages={self.languages!r}: a tuple of codes is needed, such as ('en', 'zh')")
        if self.languages is not None:
            if len(set(self.languages)) < 2:
                raise ValueError(f"languages={self.languages}: at least two are needed to choose among")
            object.__setattr__(self, "languages", tuple(self.languages))

    @property
    def added_columns(self) -> dict[str, Any]:
        """Names and Arrow types of the added columns."""
        import pyarrow as pa

        return {self.column: pa.string(), f"{self.column}_confidence": pa.float64()}

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """`batch[text_column]`: list of n strings or None -> n codes or None, n probabilities or None.

        Raises:
            KeyError: no such column.
            TypeError: a text that is not a string.
            ValueError: a code in `languages` that the model does not know.
        """
        identifier, no_evidence = _identifier(self.languages)
        codes, confidences = [], []
        for text in check_texts(batch, self.text_column):
            code, confidence = None, None
            if any(map(str.isalpha, text)):
                code, confidence = identifier.classify(unicode_form("NFC", text))  # py3langid's own NFC is quadratic
                if confidence <= no_evidence:
                    code, confidence = None, None
            codes.append(code)
            confidences.append(confidence)
        return {self.column: codes, f"{self.column}_confidence": confidences}
