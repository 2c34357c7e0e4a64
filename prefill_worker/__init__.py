"""The role that reads prompts and hands their KV blocks over."""
