"""vidcls: video action classification with Qwen2.5-VL and DeepSpeed."""

__version__ = "0.1.0"
