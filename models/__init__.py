"""The models and facts that examples, benchmarks and tests share."""
