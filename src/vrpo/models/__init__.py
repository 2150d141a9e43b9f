"""The policy, the critic and where they come from."""

from vrpo.models.critic import Critic
from vrpo.models.heads import BottleneckHead, HeadOutput, ScalarHead, build_head
from vrpo.models.lm_head import LmHead
from vrpo.models.loading import load_policy, load_tokenizer, policy_from_model, resolve_device, resolve_path
from vrpo.models.policy import Policy, Reference, frozen_head

__all__ = [
    "BottleneckHead",
    "Critic",
    "HeadOutput",
    "LmHead",
    "Policy",
    "Reference",
    "ScalarHead",
    "build_head",
    "frozen_head",
    "load_policy",
    "load_tokenizer",
    "policy_from_model",
    "resolve_device",
    "resolve_path",
]
