"""Secure sums: a server learns the sum of a cohort's vectors, and nothing of a single one (docs/secure-sums.md).

The protocol is that of Bonawitz et al., *Practical Secure Aggregation for Privacy-Preserving Machine Learning* (CCS 2017), as
two state machines without a transport. Only `fedkseed.secure.primitives` imports cryptography.
"""
