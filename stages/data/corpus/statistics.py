"""Statistics: what prepare tells of its documents: counts by source and step, and its metrics.

`block_sources` is, for every block, the index of its source in `prepare.data`.
"""

from collections.abc import Sequence
from typing import Any

from stages.config.prepare import PrepareConfig
from stages.data.corpus.blocks import Corpus
from stages.data.corpus.filtering import BlockReport, Dropped, all_dropped, check_passed
from stages.data.corpus.selection import Selection
from stages.data.corpus.shards import ShardCounts
from stages.data.reading.readers import NO_ROWS, Counts, check_counts


def row_counts(block_sources: Sequence[int], reports: Sequence[BlockReport], config: PrepareConfig) -> Counts:
    """Of all rows. Raises DataError where a source has no document left, or had too many bad rows."""
    total = NO_ROWS
    for index, source in enumerate(config.data):
        own = [report for one, report in zip(block_sources, reports, strict=True) if one == index]
        counts = sum((report.counts for report in own), NO_ROWS)
        if source.weight > 0:
            check_counts(source, counts, sum(report.num_documents for report in own))
            dropped = all_dropped(report.dropped for report in own)
            check_passed(source, sum(report.num_kept for report in own), dropped)
        total += counts
    return total


def _dropped(reports: Sequence[BlockReport], selection: Selection) -> dict[str, Dropped]:
    """Step -> what it left out, over all blocks and of all documents together."""
    return all_dropped((*(report.dropped for report in reports), selection.dropped))


def steps_of(reports: Sequence[BlockReport], selection: Selection) -> list[dict[str, Any]]:
    """Per step: how many documents stayed and were dropped, by which rules, and a few that were dropped."""
    left = sum(report.num_documents for report in reports)
    steps = []
    for step, dropped in _dropped(reports, selection).items():
        left -= dropped.total
        rules = dict(sorted(dropped.counts.items(), key=lambda item: (-item[1], item[0])))
        examples = [{"rule": rule, "text": text} for rule, text in dropped.examples]
        steps.append(
            {"step": step, "kept": left, "dropped": dropped.total, "rules": rules, "examples": examples}
        )
    return steps


def sources_of(
    block_sources: Sequence[int], reports: Sequence[BlockReport], selection: Selection, corpus: Corpus
) -> list[dict[str, int]]:
    """Per source, by its index in prepare.data: the documents read, those that no step dropped, and what the
    training text takes of them, as often as it does.
    """
    sources = []
    for source in sorted(set(block_sources)):
        is_own = corpus.source_of == source
        kept, train = is_own & selection.is_kept, selection.train[is_own[selection.train]]
        numbered = zip(block_sources, reports, strict=True)
        sources.append(
            {
                "source": source,
                "documents": sum(one.num_documents for own, one in numbered if own == source),
                "documents_kept": int(kept.sum()),
                "chars_kept": int(corpus.chars[kept].sum()),
                "documents_train": len(train),
                "chars_train": int(corpus.chars[train].sum()),
            }
        )
    return sources


def metrics_of(
    reports: Sequence[BlockReport],
    counts: Counts,
    selection: Selection,
    corpus: Corpus,
    shards: ShardCounts,
    *,
    vocab_size: int,
) -> dict[str, float]:
    """Metric -> value: documents by what became of them, and the tokens that were written."""
    dropped = _dropped(reports, selection)
    lengths = dropped.pop("length").counts
    num_chars = int(corpus.chars[selection.train].sum())
    return {
        "documents": sum(report.num_documents for report in reports),
        "documents_kept": selection.num_kept,
        "documents_heldout": len(selection.heldout),
        **{f"dropped_{rule}": lengths[rule] for rule in ("too_short", "too_long")},
        **{f"dropped_{step}": one.total for step, one in dropped.items()},
        "rows_skipped": counts.num_skipped,
        "rows_filtered": counts.num_filtered,
        "chars_train": num_chars,
        "tokens_train": shards.tokens_train,
        "tokens_dropped": shards.tokens_dropped,
        "tokens_repeated": shards.tokens_repeated,
        "tokens_heldout": shards.tokens_heldout,
        "chars_per_token": num_chars / max(1, shards.tokens_text),
        "packing_utilisation": shards.utilisation,
        "rows": shards.rows,
        "vocab_size": vocab_size,
    }
