"""posttrain: SFT, reward model, PPO-ptx on one packed batch representation."""

__version__ = "0.1.0"
