"""Quality of answers and of generated text."""

from mdm_jax.evaluation.accuracy import TaskAccuracy, measure_task_accuracy
from mdm_jax.evaluation.answers import (
    AnswerScores,
    answer_rows,
    log_likelihood_ratios,
    score_answers,
)
from mdm_jax.evaluation.multiple_choice import (
    Choices,
    choose,
    nats_per_character,
    nats_per_token,
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
from mdm_jax.evaluation.paired import PairedDifference, compare_parameters, paired_difference
from mdm_jax.evaluation.seeds import PairedSeeds, holm, paired_seeds
from mdm_jax.evaluation.text_quality import (
    GenerativePerplexity,
    Score,
    TextQuality,
    generative_perplexity,
    likelihood_score,
    measure_text_quality,
)
from mdm_jax.evaluation.windows import WindowedLikelihood, Windows, score_windows, sliding_windows
