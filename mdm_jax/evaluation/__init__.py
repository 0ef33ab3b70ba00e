"""Quality of answers and of generated text."""

from mdm_jax.evaluation.accuracy import TaskAccuracy, measure_task_accuracy
from mdm_jax.evaluation.choices import Choices, choose_until
from mdm_jax.evaluation.ngrams import (
    NgramDivergence,
    SelfBleu,
    TokenEntropy,
    distinct_ngrams,
    ngram_divergence,
    self_bleu,
    token_entropy,
)
from mdm_jax.evaluation.paired import (
    PairedDifference,
    PairedSeeds,
    compare_parameters,
    compare_until,
    holm,
    paired_difference,
    paired_seeds,
)
from mdm_jax.evaluation.quality import (
    GenerativePerplexity,
    Score,
    TextQuality,
    WordShare,
    generative_perplexity,
    likelihood_score,
    measure_text_quality,
    texts_of_rows,
    word_share,
    words_of,
)
from mdm_jax.evaluation.windows import WindowedLikelihood, Windows, score_windows, sliding_windows
