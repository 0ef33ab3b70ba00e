"""Likelihood bounds with error bars, exact values for small models, and the variance meter."""

from mdm_jax.evaluation import nested as nested
from mdm_jax.evaluation import subset_designs as subset_designs
from mdm_jax.evaluation.answers import AnswerScores as AnswerScores
from mdm_jax.evaluation.answers import answer_rows as answer_rows
from mdm_jax.evaluation.answers import log_likelihood_ratios as log_likelihood_ratios
from mdm_jax.evaluation.answers import score_answers as score_answers
from mdm_jax.evaluation.block_likelihood import make_block_likelihood as make_block_likelihood
from mdm_jax.evaluation.clip_search import ClipChoice as ClipChoice
from mdm_jax.evaluation.clip_search import candidate_intervals as candidate_intervals
from mdm_jax.evaluation.clip_search import check_feasible as check_feasible
from mdm_jax.evaluation.clip_search import gradient_noise_to_signal as gradient_noise_to_signal
from mdm_jax.evaluation.clip_search import make_clip_search as make_clip_search
from mdm_jax.evaluation.clip_search import raw_variance as raw_variance
from mdm_jax.evaluation.clip_search import relative_variance as relative_variance
from mdm_jax.evaluation.decoders import grey_value_decoder as grey_value_decoder
from mdm_jax.evaluation.decoders import normal_decoder as normal_decoder
from mdm_jax.evaluation.decompose import Decomposition as Decomposition
from mdm_jax.evaluation.decompose import decompose as decompose
from mdm_jax.evaluation.decompose import decompose_by_probes as decompose_by_probes
from mdm_jax.evaluation.decompose import decompose_gradients as decompose_gradients
from mdm_jax.evaluation.diversity import SelfBleu as SelfBleu
from mdm_jax.evaluation.diversity import TokenEntropy as TokenEntropy
from mdm_jax.evaluation.diversity import distinct_ngrams as distinct_ngrams
from mdm_jax.evaluation.diversity import self_bleu as self_bleu
from mdm_jax.evaluation.diversity import token_entropy as token_entropy
from mdm_jax.evaluation.efficiency import Comparison as Comparison
from mdm_jax.evaluation.efficiency import Efficiency as Efficiency
from mdm_jax.evaluation.efficiency import compare as compare
from mdm_jax.evaluation.efficiency import efficiency as efficiency
from mdm_jax.evaluation.efficiency import efficiency_with_data as efficiency_with_data
from mdm_jax.evaluation.estimator import Estimator as Estimator
from mdm_jax.evaluation.estimator import make_estimator as make_estimator
from mdm_jax.evaluation.exact import any_order_log_likelihood as any_order_log_likelihood
from mdm_jax.evaluation.exact import count_losses as count_losses
from mdm_jax.evaluation.exact import exact_nelbo as exact_nelbo
from mdm_jax.evaluation.exact import exact_variance as exact_variance
from mdm_jax.evaluation.exact import mask_cross_entropies as mask_cross_entropies
from mdm_jax.evaluation.exact import mask_losses as mask_losses
from mdm_jax.evaluation.exact import rate_losses as rate_losses
from mdm_jax.evaluation.gaussian_likelihood import GaussianLikelihood as GaussianLikelihood
from mdm_jax.evaluation.gaussian_likelihood import (
    make_gaussian_likelihood as make_gaussian_likelihood,
)
from mdm_jax.evaluation.generative_perplexity import GenerativePerplexity as GenerativePerplexity
from mdm_jax.evaluation.generative_perplexity import Score as Score
from mdm_jax.evaluation.generative_perplexity import generative_perplexity as generative_perplexity
from mdm_jax.evaluation.generative_perplexity import likelihood_score as likelihood_score
from mdm_jax.evaluation.levels import LevelTable as LevelTable
from mdm_jax.evaluation.levels import binned_moments as binned_moments
from mdm_jax.evaluation.levels import measure_levels as measure_levels
from mdm_jax.evaluation.levels import optimal_density as optimal_density
from mdm_jax.evaluation.levels import rate_grid as rate_grid
from mdm_jax.evaluation.levels import warp_density as warp_density
from mdm_jax.evaluation.likelihood import LevelCurve as LevelCurve
from mdm_jax.evaluation.likelihood import Likelihood as Likelihood
from mdm_jax.evaluation.likelihood import make_likelihood as make_likelihood
from mdm_jax.evaluation.multiple_choice import Choices as Choices
from mdm_jax.evaluation.multiple_choice import choose as choose
from mdm_jax.evaluation.multiple_choice import nats_per_character as nats_per_character
from mdm_jax.evaluation.multiple_choice import nats_per_token as nats_per_token
from mdm_jax.evaluation.multiple_choice import score_candidates as score_candidates
from mdm_jax.evaluation.multiple_choice import total_nats as total_nats
from mdm_jax.evaluation.next_token_likelihood import (
    make_next_token_likelihood as make_next_token_likelihood,
)
from mdm_jax.evaluation.ngram_divergence import NgramDivergence as NgramDivergence
from mdm_jax.evaluation.ngram_divergence import ngram_divergence as ngram_divergence
from mdm_jax.evaluation.ode_likelihood import OdeLikelihood as OdeLikelihood
from mdm_jax.evaluation.ode_likelihood import ode_likelihood as ode_likelihood
from mdm_jax.evaluation.paired import PairedDifference as PairedDifference
from mdm_jax.evaluation.paired import compare_parameters as compare_parameters
from mdm_jax.evaluation.paired import paired_difference as paired_difference
from mdm_jax.evaluation.quality_plot import quality_by_steps as quality_by_steps
from mdm_jax.evaluation.quality_plot import quality_curve as quality_curve
from mdm_jax.evaluation.sliding_windows import WindowedLikelihood as WindowedLikelihood
from mdm_jax.evaluation.sliding_windows import Windows as Windows
from mdm_jax.evaluation.sliding_windows import score_windows as score_windows
from mdm_jax.evaluation.sliding_windows import sliding_windows as sliding_windows
from mdm_jax.evaluation.subset_likelihood import make_subset_likelihood as make_subset_likelihood
from mdm_jax.evaluation.task_accuracy import TaskAccuracy as TaskAccuracy
from mdm_jax.evaluation.task_accuracy import measure_task_accuracy as measure_task_accuracy
from mdm_jax.evaluation.text_quality import TextQuality as TextQuality
from mdm_jax.evaluation.text_quality import measure_text_quality as measure_text_quality
from mdm_jax.evaluation.uniform_likelihood import make_uniform_likelihood as make_uniform_likelihood
