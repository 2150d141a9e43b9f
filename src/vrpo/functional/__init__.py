"""Pure mathematics on tensors: no module, no config, no logger, no hidden randomness.

Results are fp32; scalars are keyword-only; a mask is True where a position counts, and NaN where it is
False cannot leak into a result or a gradient.
"""

from vrpo.functional.advantages import gae, group_advantages
from vrpo.functional.bottleneck import gaussian_kl, reparameterise
from vrpo.functional.diagnostics import (
    auc,
    expected_calibration_error,
    explained_variance,
    explained_variance_by_position,
    frac_zero_std,
    masked_correlation,
    running_explained_variance,
    sibling_ranking_accuracy,
)
from vrpo.functional.groups import equal_responses
from vrpo.functional.kl import adaptive_kl_coef, kl_estimate
from vrpo.functional.logprobs import (
    linear_kl,
    linear_logprobs_and_entropy,
    token_entropy_and_nll,
    token_logprobs,
)
from vrpo.functional.masked import masked_mean, masked_sum, masked_var, masked_whiten
from vrpo.functional.noise import (
    debias_rewards,
    flip_rewards,
    length_bias,
    require_verdicts,
    zscore,
)
from vrpo.functional.policy_losses import PolicyLoss, ppo_clip_loss
from vrpo.functional.returns import length_adaptive_lambda, token_rewards
from vrpo.functional.sampling import SampledTokens, sample_tokens
from vrpo.functional.semantic import clamped_nll, ema, quantile_threshold, uncertain_tokens
from vrpo.functional.siblings import covered_values, sibling_correction
from vrpo.functional.uncertainty import UNCERTAINTY_FEATURES, uncertainty_features
from vrpo.functional.units import RewardUnits, reward_units, typical_rewards
from vrpo.functional.value_losses import (
    Regression,
    check_targets,
    outputs_of,
    read_values,
    value_cross_entropy,
    value_mse_loss,
)
from vrpo.functional.verdicts import (
    flip_log_likelihoods,
    gaussian_log_likelihoods,
    joint_posterior_rewards,
    joint_verdict_nll,
    posterior_rewards,
    verdict_nll,
)

__all__ = [
    "UNCERTAINTY_FEATURES",
    "PolicyLoss",
    "Regression",
    "RewardUnits",
    "SampledTokens",
    "adaptive_kl_coef",
    "auc",
    "check_targets",
    "clamped_nll",
    "covered_values",
    "debias_rewards",
    "ema",
    "equal_responses",
    "expected_calibration_error",
    "explained_variance",
    "explained_variance_by_position",
    "flip_log_likelihoods",
    "flip_rewards",
    "frac_zero_std",
    "gae",
    "gaussian_kl",
    "gaussian_log_likelihoods",
    "group_advantages",
    "joint_posterior_rewards",
    "joint_verdict_nll",
    "kl_estimate",
    "length_adaptive_lambda",
    "length_bias",
    "linear_kl",
    "linear_logprobs_and_entropy",
    "masked_correlation",
    "masked_mean",
    "masked_sum",
    "masked_var",
    "masked_whiten",
    "outputs_of",
    "posterior_rewards",
    "ppo_clip_loss",
    "quantile_threshold",
    "read_values",
    "reparameterise",
    "require_verdicts",
    "reward_units",
    "running_explained_variance",
    "sample_tokens",
    "sibling_correction",
    "sibling_ranking_accuracy",
    "token_entropy_and_nll",
    "token_logprobs",
    "token_rewards",
    "typical_rewards",
    "uncertain_tokens",
    "uncertainty_features",
    "value_cross_entropy",
    "value_mse_loss",
    "verdict_nll",
    "zscore",
]
