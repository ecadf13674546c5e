"""RL after distillation: GRPO with verifiable rewards, from an exported student; held-out accuracy before and after."""
