"""Quality of answers and of generated text."""

from mdm_jax.evaluation.answers import (
    AnswerScores,
    Choices,
    TaskAccuracy,
    answer_rows,
    choose,
    choose_until,
    log_likelihood_ratios,
    measure_task_accuracy,
    nats_per_character,
    nats_per_token,
    score_answers,
    score_candidates,
    total_nats,
)
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
