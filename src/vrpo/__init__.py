"""vrpo: post-train language models with reinforcement learning when the reward cannot be trusted."""
