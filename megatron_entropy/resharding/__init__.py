"""Between Megatron's shards and Hugging Face tensors: names, plan, folders, streams."""
