"""Which rows a few-shot prompt may show, as a sampler of lm-eval that our task files name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.samplers import ContextSampler

from nemo_longctx.config import ConfigError


class OtherDocuments(ContextSampler):
    """Draws shots as lm-eval's default sampler does, but never from the sample's own row or document.

    lm-eval leaves out only a row equal to the sample, and only where both come from one split. A local file serves for all
    splits, and a long document stands in many rows: a sample's own answer would be in its prompt.
    """

    def sample(
        self,
        n: int,
        eval_doc: Mapping[str, Any] | None = None,
        df: Sequence[Mapping[str, Any]] | None = None,
        **_kwargs: Any,
    ) -> Sequence[Mapping[str, Any]]:
        """`n` rows of other documents.

        Raises:
            ConfigError: there are not so many.
        """
        if df:
            self.replace_df(df)
        rows = self.fewshot_docs()
        pool = rows if eval_doc is None else [row for row in rows if not _same_document(row, eval_doc)]
        if len(pool) < n:
            mend = (
                f"the data has {len(pool)} rows of other documents than the sample's to show; add documents or ask fewer shots"
            )
            raise ConfigError("num_fewshot", n, mend)
        return self.rnd.sample(pool, n)


def _same_document(row: Mapping[str, Any], sample: Mapping[str, Any]) -> bool:
    return row["id"] == sample["id"] or (bool(row["context"]) and row["context"] == sample["context"])
