"""The models that the benchmarks run, made once and kept in a cache folder."""
