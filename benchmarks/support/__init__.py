"""What the benchmarks share: a stub endpoint, a load generator, certificates, an isolated HOME."""
