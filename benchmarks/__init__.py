"""One script a claim, each printing one table."""
